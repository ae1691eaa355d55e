# SPDX-License-Identifier: Apache-2.0
"""A tiny model and a small visual task, to run the whole recipe on a CPU."""
