# SPDX-License-Identifier: Apache-2.0
"""verl trainers with the visual attention reward."""
