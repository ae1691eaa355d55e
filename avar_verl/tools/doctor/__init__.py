# SPDX-License-Identifier: Apache-2.0
"""`avar doctor`: a conformance suite for a model of one's own, before GPU time is spent on it.

Each check catches a failure that otherwise shows as a wrong number, or hours into a run. No check trusts another: one
that fails stops those that need what failed, and no other.
"""
