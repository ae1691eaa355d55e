# SPDX-License-Identifier: Apache-2.0
"""`avar data check`: find the rows that would break a training or falsify it."""
