# SPDX-License-Identifier: Apache-2.0
"""Configs that hydra reads as pkg://recipes.avar.config."""
