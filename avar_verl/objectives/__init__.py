# SPDX-License-Identifier: Apache-2.0
"""Functions of the attention masses: the metric, the cold-start losses and the visual reward."""
