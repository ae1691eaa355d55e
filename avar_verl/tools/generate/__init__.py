# SPDX-License-Identifier: Apache-2.0
"""`avar generate`: answers under the intervention."""
