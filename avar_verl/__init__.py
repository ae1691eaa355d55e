# SPDX-License-Identifier: Apache-2.0
"""AVAR on verl: attention-guided cold start and a visual attention reward for vision-language models.

The core (`roles`, `attention`, `objectives`, `rewards`) is plain torch and Python and imports neither verl nor vllm.
The glue (`register`, `engine`, `trainer`, `compat`, `cli`) plugs it into verl 0.9.1.
"""

__version__ = "0.1.0"
