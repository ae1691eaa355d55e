# SPDX-License-Identifier: Apache-2.0
"""`avar rollouts`: look at what a policy wrote during training."""
