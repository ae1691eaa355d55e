# SPDX-License-Identifier: Apache-2.0
"""Prompts that vLLM writes by itself, against the processor's."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from avar_verl.model.render import render

pytestmark = pytest.mark.e2e
SIZES = [(112, 112), (224, 112), (112, 224), (224, 224)]
# In a process of its own, which imports vLLM's model.
SCRIPT = """
import json, sys
from transformers import AutoProcessor
from vllm.model_executor.models import minicpmv4_6 as model
from vllm.multimodal.parse import ImageSize
from avar_verl.plugin.compat.vllm import minicpmv4_6

processor = AutoProcessor.from_pretrained(sys.argv[1])
info = object.__new__(model.MiniCPMV4_6ProcessingInfo)
info.get_image_processor, info.get_tokenizer = lambda **_: processor.image_processor, lambda: processor.tokenizer
info._get_downsample_mode = lambda mode=None: "16x"
out = []
for patched in (False, True, True):
    if patched:
        minicpmv4_6.apply(model)
    out.append([info.get_slice_image_placeholder(ImageSize(*size)) for size in json.loads(sys.argv[2])])
print(json.dumps(out))
"""


def test_slices_of_minicpm_v(family_path, family_processor):
    """If vLLM's own are equal, it has fixed them and the patch can go."""
    pytest.importorskip("vllm")
    processor = family_processor("minicpmv4_6")
    command = [sys.executable, "-c", SCRIPT, str(family_path("minicpmv4_6")), json.dumps(SIZES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after, again = json.loads(done.stdout.splitlines()[-1])
    assert after == again
    for size, own, patched in zip(SIZES, before, after, strict=True):
        image = {"type": "image", "image": Image.new("RGB", size)}
        written = processor.tokenizer.decode(render(processor, [{"role": "user", "content": [image]}]).ids_S)
        assert f"user\n{patched}<|im_end|>" in written
        assert (f"user\n{own}<|im_end|>" in written) == (size[0] == size[1])
