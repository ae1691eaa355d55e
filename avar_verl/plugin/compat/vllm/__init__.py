# SPDX-License-Identifier: Apache-2.0
"""Workarounds for vLLM 0.24.0, one module per part of vLLM."""
