# SPDX-License-Identifier: Apache-2.0
"""`avar generate` and `avar intervene sweep` on the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avar_verl.intervention.spec import InterventionSpec
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.tools import cli
from avar_verl.tools.demo import measure, photo_grid
from avar_verl.tools.generate import answers
from avar_verl.tools.generate.answers import PromptReader, TransformersBackend, check_effect, open_backend
from avar_verl.tools.generate.command import Generate, ModelCommand
from avar_verl.tools.questions import Reply
from tests.model.families import tiny

SPEC = "alpha_img=0.35,alpha_sys=0.6"
NUM = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held_out.parquet"
    photo_grid.make_rl_parquet(path, NUM, 0, "test")
    return path


def avar(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["avar", *map(str, arguments)])
    cli.main()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_of_a_file(monkeypatch, tmp_path, tiny_model_path, data):
    """Two batches; without an intervention they are those of the demo."""
    run = ("generate", "--model", tiny_model_path, "--data", data, "--max-new-tokens", 12, "--batch-size", 2)
    avar(monkeypatch, *run, "--out", tmp_path / "plain.jsonl")
    avar(monkeypatch, *run, "--out", tmp_path / "more.jsonl", "--intervene", SPEC, "--n", 2)
    plain, more = lines(tmp_path / "plain.jsonl"), lines(tmp_path / "more.jsonl")
    checkpoint = Checkpoint.load(tiny_model_path)
    assert [line["response"] for line in plain] == measure.answers(
        checkpoint, photo_grid.make_samples(NUM, 0, "test"), 12
    )
    assert [line["row"] for line in plain] == [0, 1, 2] and [line["row"] for line in more] == [0, 1]
    assert all(line["response"] != other["response"] for line, other in zip(plain, more, strict=False))
    assert {line["intervene"] for line in more} == {SPEC} and {line["image_keys"] for line in more} == {16}
    assert all(line["finish_reason"] == ("length" if line["response_tokens"] == 12 else "stop") for line in plain)


def test_one_question(monkeypatch, capsys, tmp_path, tiny_model_path):
    tiny.sample_images(1)[0].save(tmp_path / "photo.png")
    run = ("generate", "--model", tiny_model_path, "--prompt", "What does the top left show?")
    avar(monkeypatch, *run, "--image", tmp_path / "photo.png", "--max-new-tokens", 4, "--intervene", "alpha_img=1")
    printed = capsys.readouterr()
    assert "1 answers in" in printed.err and "16.0 image keys" in printed.err
    assert "alpha_img=1.0,alpha_sys=0.0" in printed.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--prompt", "a", "--intervene", "alpha=1"), "an intervention is written"),
        (("--prompt", "<image>a"), "--prompt: a conversation must name each of its images once"),
        (
            ("--prompt", "a", "--intervene", "alpha_img=1", "--max-new-tokens", 1),
            "alpha_img needs a prompt with an image",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(monkeypatch, tiny_model_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        avar(monkeypatch, "generate", "--model", tiny_model_path, *arguments)


def test_a_system_turn_is_what_alpha_sys_needs():
    check_effect(InterventionSpec(0.1, 0.1), 1, 1)
    check_effect(InterventionSpec(0.0, 0.0), 0, 0)
    with pytest.raises(ValueError, match="alpha_sys needs a prompt with a system turn; got alpha_sys=0.4 and none"):
        check_effect(InterventionSpec(0.1, 0.4), 1, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "sglang", "prompt": "What?"}, "backend must be one of .*; got 'sglang'"),
        ({"max_model_len": 9, "prompt": "What?"}, "max_model_len is vLLM's; got 9 for transformers"),
        ({"batch_size": 0, "prompt": "What?"}, "batch_size must be at least 1; got 0"),
        ({"max_new_tokens": 0, "prompt": "What?"}, "max_new_tokens must be at least 1; got 0"),
        ({}, "needs --data or --prompt; got neither"),
        ({"data": "rl.parquet", "prompt": "What?"}, "needs --data or --prompt; got both"),
        ({"data": "rl.parquet", "image": ("cat.png",)}, "--image belongs to --prompt; got .*cat.png"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Generate(model="m", **options)


def test_dtypes(tiny_model_path):
    reader = PromptReader(tiny_model_path)
    reader.config.dtype = torch.bfloat16
    assert answers.default_dtype(reader, "cpu") == "float32" and answers.default_dtype(reader, "cuda") == "bfloat16"


def test_an_answer_ends_at_its_stop(tiny_model_path):
    reader = PromptReader(tiny_model_path)
    backend = open_backend(ModelCommand(model=str(tiny_model_path), device="cpu"), reader)
    assert isinstance(backend, TransformersBackend)
    stop, pad, cat = reader.processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "cat"])
    stopped, cut_off = backend.checkpoint.responses(torch.tensor([[cat, stop, pad, pad], [cat] * 4]), 0)
    prompt = reader([{"role": "user", "content": "What?"}])
    length = len(prompt.rendered.ids_S)
    assert reader.reply(prompt, *stopped, start=0.0) == Reply("cat", "stop", length, 2)
    assert reader.reply(prompt, *cut_off, start=0.0).finish_reason == "length"


@pytest.mark.e2e
def test_a_sweep_from_the_command_line(monkeypatch, capsys, tmp_path, tiny_model_path, data):
    run = ("intervene", "sweep", "--model", tiny_model_path, "--data", data, "--out", tmp_path / "sweep")
    run += ("--alpha-img", "0,0.35", "--alpha-sys", "0,0.6", "--max-new-tokens", 8, "--batch-size", 2)
    avar(monkeypatch, *run)
    first = capsys.readouterr().out
    assert "3 questions" in first and "0 of 3 settings differ significantly" in first
    folder = tmp_path / "sweep"
    records = lines(folder / "alpha_img=0.35,alpha_sys=0.6" / "records.jsonl")
    avar(
        monkeypatch, "generate", "--model", tiny_model_path, "--data", data, "--max-new-tokens", 8,
        "--intervene", SPEC, "--out", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert [r["response"] for r in records] == [line["response"] for line in lines(tmp_path / "answers.jsonl")]
    assert (folder / "sweep.png").stat().st_size > 1000
    written = json.loads((folder / "sweep.json").read_text())
    assert [(cell["alpha_img"], cell["alpha_sys"]) for cell in written["cells"]] == [(0.35, 0), (0, 0.6), (0.35, 0.6)]
    # Once more: nothing is asked, the same comes out.
    monkeypatch.setattr(TransformersBackend, "answers", None)
    capsys.readouterr()
    avar(monkeypatch, *run)
    assert capsys.readouterr().out.split("settings differ")[0] == first.split("settings differ")[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--alpha-img", "0.1", "--alpha-sys", "0"), "values of alpha_img must differ, and 0 must be among them"),
        (("--alpha-img", "0,0.1", "--alpha-sys", "0", "--layers", "x"), "layers are indices and ranges"),
    ],
)
def test_sweeps_that_cannot_be_made_are_refused(monkeypatch, tmp_path, tiny_model_path, data, arguments, message):
    run = ("intervene", "sweep", "--model", tiny_model_path, "--data", data, "--out", tmp_path)
    with pytest.raises(SystemExit, match=message):
        avar(monkeypatch, *run, *arguments)


@pytest.mark.e2e
def test_vllm_gives_the_same_answers(monkeypatch, tmp_path, tiny_model_path, data):
    pytest.importorskip("vllm")
    run = ("generate", "--model", tiny_model_path, "--data", data, "--max-new-tokens", 12, "--intervene", SPEC)
    avar(monkeypatch, *run, "--out", tmp_path / "transformers.jsonl")
    command = [sys.executable, "-m", "avar_verl", *map(str, run), "--backend", "vllm", "--max-model-len", "128"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "vllm.jsonl"],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert lines(tmp_path / "vllm.jsonl") == lines(tmp_path / "transformers.jsonl")
