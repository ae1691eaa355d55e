# SPDX-License-Identifier: Apache-2.0
"""What verl 0.9.1 and vLLM 0.24.0 need besides their plug points, one module per reason.

Every module names the upstream lines it relies on, and a test in tests/plugin/compat fails when those lines change.
"""
