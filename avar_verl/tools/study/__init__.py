# SPDX-License-Identifier: Apache-2.0
"""The study of the lazy-attention task: many small runs of the recipe, and what they say of the paper's claims."""
