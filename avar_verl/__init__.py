# SPDX-License-Identifier: Apache-2.0
"""AVAR on verl: attention-guided cold start and a visual attention reward for vision-language models.

The core (`model`, `attention`, `objectives`, `intervention`, `anchors`, `rewards`, `data`) is plain torch and Python.
`plugin` connects it to verl 0.9.1 and is the only package that imports verl. `tools` has the commands of `avar`.
"""

from avar_verl import moved

__version__ = "0.1.0"

moved.install()
