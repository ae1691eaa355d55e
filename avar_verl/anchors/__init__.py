# SPDX-License-Identifier: Apache-2.0
"""Visual anchors: references to the image in a response, as coordinates or in words. Pure Python, no verl import."""

from avar_verl.anchors.anchor import Anchor, to_pixels
from avar_verl.anchors.parse import parse_anchors

__all__ = ["Anchor", "parse_anchors", "to_pixels"]
