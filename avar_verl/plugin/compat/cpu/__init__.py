# SPDX-License-Identifier: Apache-2.0
"""What a machine without a GPU needs."""
