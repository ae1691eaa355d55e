# SPDX-License-Identifier: Apache-2.0
"""Asking, recording and going on, against a server that records what it is asked."""

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessage

from avar_verl.tools.evaluate import client
from avar_verl.tools.evaluate.command import Eval, Sampling
from avar_verl.tools.evaluate.run import local_model, patch_size_for, run_eval
from avar_verl.tools.evaluate.server import free_port
from avar_verl.tools.records import Records
from avar_verl.tools.runs import RECORDS, SETTINGS
from tests.tools.evaluate.conftest import sent
from tests.tools.evaluate.fake_server import image_digest, serving


async def right(number, request):
    return 200, f"<answer>{image_digest(request)}</answer>"


def settings(server, data: Path, out: Path, **changes) -> Eval:
    defaults = {"model": "fake", "server_url": server.url, "data": (data,), "out": out, "concurrency": 4}
    return Eval(**{**defaults, **changes})


def lines(out: Path, task: str = "digests") -> list[dict]:
    return [json.loads(line) for line in (out / task / RECORDS).read_text().splitlines()]


def test_every_item_is_asked_once_with_its_picture_and_recorded(tmp_path, digests):
    with serving(right) as server:
        results = run_eval(settings(server, digests(7), tmp_path / "out", sampling=Sampling(max_tokens=5)))
    task = results["tasks"]["digests"]
    assert (task["n"], task["correct"], task["accuracy"], task["score"]) == (7, 7, 1.0, 1.0)
    assert len(server.requests) == 7
    records = {record["id"]: record for record in lines(tmp_path / "out")}
    assert sorted(records) == [str(number) for number in range(7)]
    for request in server.requests:
        image, text = request["messages"][0]["content"]
        number = int(text["text"].removeprefix("Question ").removesuffix("?"))
        assert image["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(sent(number)).decode()}"
        assert request["max_tokens"] == 5 and request["temperature"] == 0 and request["model"] == "fake"
        record = records[str(number)]
        assert record["correct"] and record["answer"] == record["ground_truth"][0]
        assert (record["prompt_tokens"], record["response_tokens"], record["data_source"]) == (3, 2, "digests")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


@pytest.mark.parametrize("concurrency", [1, 5])
def test_so_many_requests_at_a_time_and_no_more(tmp_path, digests, concurrency):
    async def slow(number, request):
        await asyncio.sleep(0.03)
        return await right(number, request)

    with serving(slow) as server:
        run_eval(settings(server, digests(20), tmp_path / "out", concurrency=concurrency))
    assert server.most_running == concurrency


def test_a_busy_or_broken_server_is_asked_again(tmp_path, digests):
    seen: dict[str, int] = {}

    async def flaky(number, request):
        digest = image_digest(request)
        seen[digest] = seen.get(digest, 0) + 1
        if seen[digest] <= 3:
            return {1: 429, 2: 503, 3: 500}[seen[digest]], "later"
        return await right(number, request)

    with serving(flaky) as server:
        results = run_eval(settings(server, digests(3), tmp_path / "out", max_retries=3))
    assert results["tasks"]["digests"]["accuracy"] == 1.0
    assert set(seen.values()) == {4}
    assert len(lines(tmp_path / "out")) == 3


def test_a_timeout_is_asked_again(tmp_path, digests):
    async def stuck_once(number, request):
        if number == 0:
            await asyncio.sleep(5)
        return await right(number, request)

    with serving(stuck_once) as server:
        run_eval(settings(server, digests(1), tmp_path / "out", request_timeout=0.3))
    assert len(server.requests) == 2


def test_an_item_that_is_refused_is_named_and_not_recorded(tmp_path, digests):
    refuse = True

    async def picky(number, request):
        if refuse and request["messages"][0]["content"][1]["text"] == "Question 2?":
            return 400, "the prompt is too long"
        return await right(number, request)

    data = digests(5)
    with serving(picky) as server:
        with pytest.raises(RuntimeError, match="1 items have no answer.*\ndigests 2: .*the prompt is too long"):
            run_eval(settings(server, data, tmp_path / "out"))
        assert len(server.requests) == 5  # A refusal is not asked again.
        assert not (tmp_path / "out" / "results.json").exists()
        refuse = False
        assert run_eval(settings(server, data, tmp_path / "out"))["tasks"]["digests"]["n"] == 5
    assert len(server.requests) == 6


def test_a_server_that_refuses_everything_ends_the_run(tmp_path, digests):
    async def refuse(number, request):
        return 400, "no"

    with serving(refuse) as server:
        with pytest.raises(RuntimeError, match=f"{client.MAX_FAILURES_IN_A_ROW} items in a row have no answer"):
            run_eval(settings(server, digests(40), tmp_path / "out", concurrency=1))
    assert len(server.requests) == client.MAX_FAILURES_IN_A_ROW


def test_a_check_that_fails_ends_the_run():
    async def never(item):
        await asyncio.sleep(60)

    def dead():
        raise RuntimeError("vLLM ended with exit code 1")

    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="vLLM ended"):
        asyncio.run(client.ask_all([1, 2], never, concurrency=2, check=dead))
    assert time.monotonic() - begin < 10


def test_a_finished_run_asks_nothing_and_a_longer_one_only_the_rest(tmp_path, digests):
    data = digests(9)
    with serving(right) as server:
        run_eval(settings(server, data, tmp_path / "out", n=4))
        assert len(server.requests) == 4
        again = run_eval(settings(server, data, tmp_path / "out", n=4))
        assert len(server.requests) == 4 and again["tasks"]["digests"]["n"] == 4
        run_eval(settings(server, data, tmp_path / "out"))
        assert len(server.requests) == 9
        fewer = run_eval(settings(server, data, tmp_path / "out", n=2))
    assert len(server.requests) == 9 and fewer["tasks"]["digests"]["n"] == 2
    assert sorted(record["id"] for record in lines(tmp_path / "out")) == [str(number) for number in range(9)]


def test_a_torn_line_is_dropped_and_asked_again(tmp_path, digests):
    data = digests(3)
    with serving(right) as server:
        run_eval(settings(server, data, tmp_path / "out"))
        path = tmp_path / "out" / "digests" / RECORDS
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        run_eval(settings(server, data, tmp_path / "out"))
    assert len(server.requests) == 4
    assert len(lines(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "<answer>cat</answer>"}, "<answer>cat</answer>"),
        ({"content": None}, ""),
        # A reasoning parser: of vLLM and of others, with an answer behind the reasoning, and without.
        ({"content": "\ncat", "reasoning": "I look."}, "<think>I look.</think>\ncat"),
        ({"content": "cat", "reasoning_content": "I look."}, "<think>I look.</think>cat"),
        ({"content": None, "reasoning": "a </think>cat", "reasoning_content": "a </think>cat"}, "a </think>cat"),
        ({"content": "", "reasoning": "I loo"}, "I loo"),
    ],
)
def test_the_text_of_a_reply_whole(message, text):
    assert client.response_text(ChatCompletionMessage(role="assistant", **message)) == text


def test_a_reply_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="a reply must be text; got refusal. Start the server without"):
        client.response_text(ChatCompletionMessage(role="assistant", content=None, refusal="No."))


def test_the_patch_size_is_the_model_s(tiny_model_path, tmp_path):
    def of(**changes):
        asked = Eval(model="m", out=tmp_path, **changes)
        return patch_size_for(asked, tiny_model_path if "server_url" not in changes else None)

    assert (of(), of(patch_size=16), of(server_url="http://x/v1")) == (14, 16, 14)
    with pytest.raises(ValueError, match="a checkpoint must have a processor for images; got from"):
        patch_size_for(Eval(model="m", out=tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": Sampling(max_tokens=7)}, "sampling.max_tokens: 2048 there, 7 now"),
        ({"sampling": Sampling(temperature=1.0)}, "sampling.temperature: 0.0 there, 1.0 now"),
        ({"answers": "whole"}, "answer_rule: 'reward' there, 'whole' now"),
        ({"model": "other"}, "model: 'fake' there, 'other' now"),
        ({"patch_size": 16}, "patch_size: None there, 16 now"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, digests, changes, named):
    data = digests(2)
    with serving(right) as server:
        first = settings(server, data, tmp_path / "out")
        run_eval(first)
        with pytest.raises(ValueError, match=named.replace(".", r"\.")):
            run_eval(replace(first, **changes))
        run_eval(replace(first, concurrency=1, max_retries=0, server_url=server.url))  # These change no answer.
    assert len(server.requests) == 2


def test_other_data_do_not_mix(tmp_path, digests):
    with serving(right) as server:
        run_eval(settings(server, digests(2), tmp_path / "out"))
        with pytest.raises(ValueError, match="got another one for item '0' of digests in .*: the data have changed"):
            run_eval(settings(server, digests(2, first=5), tmp_path / "out"))


def test_a_model_is_a_hugging_face_folder(tmp_path):
    with pytest.raises(ValueError, match="got no config.json"):
        local_model(Eval(model=str(tmp_path), out=tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert local_model(Eval(model=str(tmp_path), out=tmp_path)) == tmp_path.resolve()


def test_a_folder_of_an_earlier_version_is_refused(tmp_path, digests):
    """Its settings hold another fingerprint of the model."""
    with serving(right) as server:
        run_eval(settings(server, digests(1), tmp_path / "out"))
        path = tmp_path / "out" / "digests" / SETTINGS
        held = json.loads(path.read_text())
        held["model_fingerprint"] = held.pop("model_files")
        path.write_text(json.dumps({**held, "model_fingerprint": "abc"}))
        with pytest.raises(ValueError, match="another version of avar wrote it"):
            run_eval(settings(server, digests(1), tmp_path / "out"))


@pytest.mark.parametrize("line", ["nonsense", '{"id": "1"}', "[]"])
def test_a_broken_record_is_named(tmp_path, line):
    (tmp_path / RECORDS).write_text(f"{line}\n")
    with pytest.raises(ValueError, match="line 1 of .* must be a record; got"):
        Records(tmp_path, {})


def wait_for(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(urllib.error.URLError):
        return opener.open(f"{url}/models", timeout=5).status == 200
    return False


@pytest.mark.e2e
def test_a_killed_run_goes_on_without_losing_or_repeating_an_item(tmp_path, digests):
    """Client killed in the middle, then run again: what was recorded is not asked again, and nothing is missing."""
    data, out, log, port = digests(30), tmp_path / "out", tmp_path / "asked.jsonl", free_port()
    url = f"http://127.0.0.1:{port}/v1"
    server = subprocess.Popen([sys.executable, "-m", "tests.tools.evaluate.fake_server", str(port), str(log), "0.1"])
    command = [
        sys.executable,
        "-m",
        "avar_verl",
        "eval",
        "--model",
        "fake",
        "--server-url",
        url,
        "--data",
        str(data),
    ]
    command += ["--out", str(out), "--concurrency", "3"]
    records = out / "digests" / RECORDS
    try:
        wait_for(lambda: answers(url))
        first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(lambda: records.exists() and records.read_bytes().count(b"\n") >= 6)
        first.kill()
        first.wait()
        kept = records.read_bytes()
        whole = kept[: kept.rfind(b"\n") + 1]
        assert 6 <= whole.count(b"\n") < 30
        asked = [json.loads(line)["image"] for line in log.read_text().splitlines()]
        subprocess.run(command, check=True, timeout=120)
    finally:
        server.kill()
        server.wait()
    assert records.read_bytes().startswith(whole)  # What was recorded before is still there, untouched.
    done = lines(out)
    assert sorted(int(record["id"]) for record in done) == list(range(30))
    assert all(record["correct"] for record in done)
    asked_again = [json.loads(line)["image"] for line in log.read_text().splitlines()][len(asked) :]
    before = {json.loads(line)["answer"] for line in whole.splitlines()}
    assert not before & set(asked_again)
    assert len(asked_again) == 30 - len(before)
    assert len(asked) - len(before) <= 3  # In flight when the client was killed.


SPEC = "alpha_img=0.15,alpha_sys=0.0"


def xargs(request):
    return request.get("vllm_xargs", {}).get("avar_intervene")


def test_an_intervention_is_in_every_request_and_in_the_settings(tmp_path, digests):
    async def with_plugin(number, request):
        return (400, "an intervention is written ...") if xargs(request) == "no spec" else await right(number, request)

    with serving(with_plugin) as server:
        first = settings(server, digests(2), tmp_path / "out", intervene=" alpha_img = 0.15")
        assert run_eval(first)["intervene"] == SPEC
        assert [xargs(request) for request in server.requests] == ["no spec", SPEC, SPEC]
        with pytest.raises(ValueError, match="intervene: .* there, '' now"):
            run_eval(replace(first, intervene=None))
        run_eval(replace(first, intervene=None, out=tmp_path / "plain"))
        assert [xargs(request) for request in server.requests[3:]] == [None, None]
        with pytest.raises(ValueError, match="got 'alpha'"):
            run_eval(replace(first, intervene="alpha=1"))


def test_a_server_that_ignores_interventions_is_refused(tmp_path, digests):
    with serving(right) as server:
        with pytest.raises(ValueError, match="got a server that ignores avar_intervene"):
            run_eval(settings(server, digests(2), tmp_path / "out", intervene="alpha_img=0.15"))
    assert len(server.requests) == 1 and not lines(tmp_path / "out")


def test_settings_that_cannot_be_right_are_refused(tmp_path, digests):
    with pytest.raises(ValueError, match="needs --tasks or --data"):
        run_eval(Eval(model="fake", out=tmp_path, server_url="http://127.0.0.1:9/v1"))
    with pytest.raises(ValueError, match="every task once"):
        run_eval(Eval(model="fake", out=tmp_path, server_url="x", data=(digests(1), digests(1))))
    with pytest.raises(ValueError, match="concurrency must be at least 1; got 0"):
        asyncio.run(client.ask_all([], None, concurrency=0))
    with pytest.raises(ValueError, match="must be a Hugging Face folder or a name on the hub"):
        run_eval(Eval(model=str(tmp_path / "nothing" / "there" / "x"), out=tmp_path, data=(digests(1),)))
    for changes, rule in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=rule):
            Sampling(**changes)


def test_the_model_of_a_server_must_be_clear(tmp_path, digests):
    class Model:
        def __init__(self, name):
            self.id = name

    class Models:
        def __init__(self, names):
            self.names = names

        async def _all(self):
            for name in self.names:
                yield Model(name)

        def list(self):
            return self._all()

    def name(names, wanted):
        stub = type("Client", (), {"models": Models(names)})()
        return asyncio.run(client.served_name(stub, wanted))

    assert name(["a", "b"], "b") == "b"
    assert name(["a"], "b") == "a"
    with pytest.raises(ValueError, match="or only one model"):
        name(["a", "b"], "c")
