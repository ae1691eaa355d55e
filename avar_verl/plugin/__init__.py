# SPDX-License-Identifier: Apache-2.0
"""The plugin for verl 0.9.1: all code that imports verl."""
