# SPDX-License-Identifier: Apache-2.0
"""verl training engines with attention capture."""
