# SPDX-License-Identifier: Apache-2.0
"""Data sets for verl's trainers, and the check of rows that renders them."""
