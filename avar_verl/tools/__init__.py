# SPDX-License-Identifier: Apache-2.0
"""The commands of `avar`, one package each; the modules in this folder are shared."""
