# SPDX-License-Identifier: Apache-2.0
"""The commands of `avar`, one package each; modules here are shared by several."""
