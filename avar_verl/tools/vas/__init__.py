# SPDX-License-Identifier: Apache-2.0
"""`avar vas`: VAS of any checkpoint on any data, reports, and comparisons of checkpoints (docs/vas.md)."""
