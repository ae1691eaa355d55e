# SPDX-License-Identifier: Apache-2.0
"""`avar synth run` with local engines: vLLM on the CPU behind ray.data.llm, a tiny random model."""

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.exceptions import RayError
from transformers import AutoProcessor

from avar_verl.tools.demo.tiny_model import build_tiny_model
from avar_verl.tools.synth.chain import make_request
from avar_verl.tools.synth.config import load_config
from avar_verl.tools.synth.items import read_items
from avar_verl.tools.synth.pipeline import _cause
from examples.synth.inputs import write_inputs
from examples.synth.kill_and_resume import ROOT

CONFIG = ROOT / "recipes" / "avar" / "synth" / "engine.yaml"
MAX_MODEL_LEN = 4096
MAX_TOKENS = 64
# As docs/synth.md has it for a CPU.
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# vLLM cannot take a prompt in parts on a CPU if the request has a seed.
WHOLE = {"enable_chunked_prefill": False, "max_num_batched_tokens": MAX_MODEL_LEN}
PARTS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("engine") / "model", max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture
def options(tmp_path, model):
    """`options(**engine_kwargs)` -> fields of engine.yaml for a CPU."""

    def make(**kwargs):
        kwargs |= {"max_model_len": MAX_MODEL_LEN, "tensor_parallel_size": 1, "dtype": "float32"}
        kwargs |= {"enforce_eager": True, "max_num_seqs": 4, "skip_mm_profiling": True}
        out = [f"out={tmp_path / 'out'}", f"input.files=[{tmp_path / 'inputs.parquet'}]"]
        for name in ("describer", "thinker"):
            engine = f"models.{name}.engine"
            out += [f"{engine}.model_source={model}", f"{engine}.engine_kwargs={json.dumps(kwargs)}"]
            out += [f"{engine}.concurrency=1", f"{engine}.batch_size=3", f"{engine}.max_restarts=0"]
            out += [f"{engine}.placement_group_config={{bundle_per_worker: {{CPU: 1}}}}"]
        # Nobody has taught the model to end: a description ends at a blank or a letter, reasoning where it is cut.
        out += [f"stages.{name}.max_tokens={MAX_TOKENS}" for name in ("describe", "reason", "integrate")]
        return [*out, 'stages.describe.extra={stop: [e, a, o, " "]}']

    return make


def run(options):
    command = [sys.executable, "-m", "avar_verl", "synth", "run", "--config", str(CONFIG), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, env={**os.environ, **CPU})


def rows(folder, table):
    with contextlib.closing(sqlite3.connect(folder / "out" / "cache.sqlite")) as base:
        base.row_factory = sqlite3.Row
        return [dict(row) for row in base.execute(f"SELECT * FROM {table}")]


def test_the_cause_of_a_ray_error_is_without_frames():
    frames = '  File "ray.py", line 1, in init\n    self.init()\n    ^^^^^^^^^^^\n  File "vllm.py", line 2\n    raise'
    text = f"The actor died: \x1b[36mray::Map()\x1b[39m\n{frames}\nValueError: 1 error\n  dtype is wrong\n"
    assert _cause(RayError(text)) == "ValueError: 1 error dtype is wrong"
    locked = RayError('The actor died:\n  File "store.py", line 1\n    raise\nValueError: one run at a time')
    assert _cause(locked) == "ValueError: one run at a time"
    assert _cause(RayError("The actor died.\n\tpid: 3")) == "The actor died. pid: 3"


@pytest.mark.e2e
def test_a_run_on_local_engines(tmp_path, model, options):
    """Stage 1 with images and stage 2 without; a request that vLLM refuses is an item's failure, not the run's."""
    write_inputs(tmp_path / "inputs.parquet", 5)
    table = pq.read_table(tmp_path / "inputs.parquet").to_pylist()
    table[1]["question"] += " word" * MAX_MODEL_LEN
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "inputs.parquet")

    done = run(options(**WHOLE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "describe: 4 new answers, 0 from the cache, 1 failed" in done.stdout

    (failure,) = rows(tmp_path, "failures")
    assert failure["stage"] == "describe" and "maximum context length is 4096 tokens" in failure["reason"]

    config = load_config(CONFIG, options(**WHOLE))
    items = {item.id: item for item in read_items(config.input)}
    processor = AutoProcessor.from_pretrained(model)
    calls = rows(tmp_path, "calls")
    described = {call["item"]: call for call in calls if call["stage"] == "describe"}
    reasoned = {call["item"]: call for call in calls if call["stage"] == "reason"}
    assert len(described) == 4 and reasoned and {call["stage"] for call in calls} == {"describe", "reason"}
    for stage, answers in (("describe", described), ("reason", reasoned)):
        for name, call in answers.items():
            earlier = {"description": described[name]["text"].strip()}
            request = make_request(config, stage, items[name], earlier)
            assert call["key"] == request.key
            # The prompt, its images in it, is what the processor makes of the same messages.
            messages = request.body()["messages"]
            images = []
            if request.sees_images:
                images = [Image.open(io.BytesIO(picture.data)) for picture in items[name].pictures]
                messages[-1]["content"] = [*({"type": "image"} for _ in images), messages[-1]["content"][-1]]
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            wanted = processor(text=[text], images=images or None)["input_ids"][0]
            assert call["input_tokens"] == len(wanted)
            cut = call["output_tokens"] == MAX_TOKENS
            assert call["finish"] == ("length" if cut else "stop") and 1 <= call["output_tokens"] <= MAX_TOKENS
    assert any(call["finish"] == "stop" for call in described.values())

    gates = {row["id"]: row["gate"] for row in pq.read_table(tmp_path / "out" / "records.parquet").to_pylist()}
    assert gates[failure["item"]] == "call" and set(gates) == set(items)
    assert set(gates.values()) <= {"call", "format", "truncated"}


@pytest.mark.slow
def test_an_engine_that_dies_stops_the_run_and_another_run_goes_on(tmp_path, options):
    """vLLM's CPU build dies of a prompt in parts; a second run answers what is open, a third one asks for nothing."""
    write_inputs(tmp_path / "inputs.parquet", 3)
    first = run(options(**PARTS))
    assert first.returncode == 1 and "Traceback" not in first.stderr, first.stdout + first.stderr
    assert "the engine of stage describe has failed: The actor died unexpectedly" in first.stderr
    assert "run again to continue" in first.stderr and not rows(tmp_path, "calls")
    second = run(options(**WHOLE))
    assert second.returncode == 0 and "describe: 3 new answers, 0 from the cache, 0 failed" in second.stdout
    third = run(options(**WHOLE))
    assert third.returncode == 0 and third.stdout.count("no open requests, no engine started") == 3
    assert len(rows(tmp_path, "calls")) == len({call["key"] for call in rows(tmp_path, "calls")})


@pytest.mark.slow
def test_an_engine_that_does_not_start_stops_the_run(tmp_path, options):
    write_inputs(tmp_path / "inputs.parquet", 3)
    done = run(options(kv_cache_dtype="moon", **WHOLE))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "has failed: pydantic_core" in done.stderr and "cache_dtype" in done.stderr


@pytest.mark.e2e
def test_an_engine_that_does_not_fit_is_refused(tmp_path, options):
    """It would be waited for, for ever."""
    write_inputs(tmp_path / "inputs.parquet", 3)
    more = ["models.thinker.engine.placement_group_config={bundle_per_worker: {GPU: 4096}}"]
    done = run([*options(), *more])
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the engine of stage reason must fit this machine" in done.stderr and "'GPU': 4096.0" in done.stderr
