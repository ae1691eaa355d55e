# SPDX-License-Identifier: Apache-2.0
"""`avar rewards`: try a reward function on recorded rollouts."""
