# SPDX-License-Identifier: Apache-2.0
"""`avar doctor`: checks whether a model can be trained with this recipe, before GPU time is spent on it.

Each check catches a failure that otherwise shows up as a wrong number, or hours into a run. A failed check skips the
checks that need it, and no others.
"""
