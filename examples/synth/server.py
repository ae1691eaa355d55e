# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server that plays all three models of VARD for photo grids. No model, no network.

    python -m examples.synth.server --port 8011 --n 500 --log calls.jsonl

Stage 1 (a request with an image) is answered from the grid's ground truth, stage 2 from the description in the prompt,
stage 3 from the reasoning in the prompt; like a model, it knows nothing else. Its answer depends only on the content of
the request, so a second run gets the same answers:

- `--wrong`: fraction of wrong answers; half of them become wrong in stage 3.
- `--flawed`: fraction of rewritten reasoning with another fault: it still mentions the description, checks nothing, has
  no reference to the image, or lost its tags.
- `--errors`: fraction of attempts that fail: 429 with Retry-After, 500, or no answer at all, in equal parts. Every
  attempt at a request is drawn anew.

Every attempt is one line of the log: time of arrival and of the end, key (hash of the request), stage, attempt, status
(0: no answer), whether the answer is wrong or flawed, bytes. `--die-after` ends the process after so many answers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from typing import Any, TextIO

from aiohttp import web

from avar_verl.tools.demo import photo_grid
from avar_verl.tools.synth.items import make_picture

HANG_S = 3600.0
FLAWS = ("description", "no_check", "no_image", "no_tags")
_SHOWN = re.compile(r"(top left|top right|bottom left|bottom right) (\[[\d, ]+\]) shows the (\w+)")


def chance(*parts: str) -> float:
    """A number in [0, 1), derived from the parts."""
    return int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest()[:6], "big") / 2**48


def describe(sample: photo_grid.Sample) -> str:
    """Stage 1, from the ground truth."""
    shown = zip(photo_grid.PLACES.items(), sample.crops, strict=True)
    looks = " ".join(f"The {place} {list(box)} shows the {crop.name}." for (place, box), crop in shown)
    scan, synthesis = "1. Global scan: a grid of four photographs.", "4. Synthesis: four photographs."
    return f"{scan}\n2. Elements: {looks}\n3. Relations: two rows of two.\n{synthesis}"


def _read_description(prompt: str) -> dict[str, tuple[str, str]]:
    """place -> (box, name), from a description or reasoning."""
    return {place: (box, name) for place, box, name in _SHOWN.findall(prompt)}


def _question(prompt: str) -> str:
    return re.search(r"^Question: (.*)$", prompt, re.MULTILINE)[1]


def solve(question: str, seen: dict[str, tuple[str, str]]) -> tuple[str, list[str]]:
    """(answer, places in the order of the evidence) of a question about what the places show."""
    names = {place: name for place, (_, name) in seen.items()}
    if match := re.fullmatch(r"What does the (.*) show\?", question):
        return names[match[1]], [place for place in names if place != match[1]] + [match[1]]
    if match := re.fullmatch(r"Which place shows the same as the (.*)\?", question):
        answer = next(place for place in names if place != match[1] and names[place] == names[match[1]])
        return answer, [match[1], *(place for place in names if place != match[1])]
    if match := re.fullmatch(r"Which place shows the (.*)\?", question):
        return next(place for place in names if names[place] == match[1]), list(names)
    if match := re.fullmatch(r"How many places show the (.*)\?", question):
        return str(sum(name == match[1] for name in names.values())), list(names)
    raise ValueError(f"the server knows the questions of the photo grid; got {question!r}. Use its inputs.")


def other_answer(answer: str, key: str) -> str:
    """A wrong answer of the same kind."""
    for kind in photo_grid.KINDS:
        answers = photo_grid.answers_of(kind)
        if answer in answers:
            rest = [one for one in answers if one != answer]
            return rest[int(chance("other", key) * len(rest))]
    raise ValueError(f"an answer must be one of the photo grid's; got {answer!r}.")


def reason(prompt: str, wrong: bool, key: str) -> str:
    """Stage 2: reasoning over the description in the prompt, with a check of the deciding place."""
    seen, question = _read_description(prompt.split("</description>")[0]), _question(prompt)
    answer, order = solve(question, seen)
    looks = [f"According to the description, {place} {seen[place][0]} shows the {seen[place][1]}." for place in order]
    last = answer if answer in seen else order[-1]
    check = f"Wait, let me check the description again: {last} {seen[last][0]} shows the {seen[last][1]}."
    answer = other_answer(answer, key) if wrong else answer
    return f"<reasoning>{' '.join([*looks, check])} So it is {answer}.</reasoning>\n<answer>{answer}</answer>"


def integrate(prompt: str, wrong: bool, flaw: str, key: str) -> str:
    """Stage 3: the reasoning in the prompt, rewritten to look at the picture."""
    text, answer = re.search(r"<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>", prompt, re.DOTALL).groups()
    if wrong:
        other = other_answer(answer, key)
        text, answer = text.replace(f"So it is {answer}.", f"So it is {other}."), other
    if flaw != "description":
        first, *rest = text.replace("According to the description, ", "\0").split("\0")[1:]
        text = f"In the image, the {first}" + "".join(f"the {part}" for part in rest)
        text = text.replace("check the description again:", "look back at the image: the")
    if flaw == "no_check":
        text = re.sub(r" ?Wait, [^.]*\.", "", text)
    if flaw == "no_image":
        text = _SHOWN.sub(r"\1 shows the \3", text).replace("In the image, the ", "The ")
        text = text.replace("look back at the image: ", "check: ")
    if flaw == "no_tags":
        return f"{text} The answer is {answer}."
    return f"<reasoning>{text}</reasoning>\n<answer>{answer}</answer>"


class Server:
    """The application and what it has counted."""

    def __init__(self, args: argparse.Namespace, log: TextIO | None):
        self.args, self.log = args, log
        self.samples: dict[str, photo_grid.Sample] = {}
        self.attempts: Counter[str] = Counter()
        self.answered = 0
        for sample in photo_grid.iter_samples(args.n, args.seed, args.split):
            self.samples[make_picture(sample.image).pixels] = sample
        self.by_payload: dict[str, photo_grid.Sample] = {}

    def application(self) -> web.Application:
        """To be served."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/health", self.health)
        return app

    async def health(self, request: web.Request) -> web.Response:
        """What was counted so far."""
        return web.json_response({"answered": self.answered})

    def _sample(self, url: str) -> photo_grid.Sample:
        if url not in self.by_payload:
            self.by_payload[url] = self.samples[make_picture(base64.b64decode(url.partition(",")[2])).pixels]
        return self.by_payload[url]

    def answer(self, body: dict[str, Any], key: str) -> tuple[str, str, bool, str]:
        """(stage, text, wrong, flaw) of a request."""
        content = body["messages"][-1]["content"]
        if not isinstance(content, str):
            url = next(block["image_url"]["url"] for block in content if block["type"] == "image_url")
            return "describe", describe(self._sample(url)), False, ""
        wrong, flawed = chance("wrong", key) < self.args.wrong / 2, chance("flawed", key) < self.args.flawed
        if "<description>" in content:
            return "reason", reason(content, wrong, key), wrong, ""
        # Applied to answers that stage 2 left right, so that the overall fraction is the requested one.
        wrong = chance("wrong", key) < self.args.wrong / 2 / (1 - self.args.wrong / 2)
        flaw = FLAWS[int(chance("flaw", key) * len(FLAWS))] if flawed and not wrong else ""
        return "integrate", integrate(content, wrong, flaw, key), wrong, flaw

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One attempt."""
        start = time.time()
        raw = await request.read()
        key = hashlib.sha256(raw).hexdigest()[:16]
        self.attempts[key] += 1
        attempt = self.attempts[key]
        stage, text, wrong, flaw = self.answer(json.loads(raw), key)
        dice = chance("error", key, str(attempt)) / self.args.errors if self.args.errors else 1.0
        entry = {"start": start, "key": key, "stage": stage, "attempt": attempt, "wrong": wrong, "flaw": flaw}
        entry |= {"status": 0, "bytes": len(raw)}
        try:
            await asyncio.sleep(self.args.latency)
            if dice < 1 / 3:
                entry["status"] = 429
                headers = {"Retry-After": f"{self.args.retry_after:g}"}
                return web.json_response({"error": {"message": "slow down"}}, status=429, headers=headers)
            if dice < 2 / 3:
                entry["status"] = 500
                return web.json_response({"error": {"message": "the model is gone"}}, status=500)
            if dice < 1:
                await asyncio.sleep(HANG_S)
            entry["status"] = 200
            self.answered += 1
            usage = {"prompt_tokens": len(raw) // 16, "completion_tokens": len(text) // 4}
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            response = web.json_response({"object": "chat.completion", "choices": [choice], "usage": usage})
            # Sent here, so that the log says what has left this process.
            await response.prepare(request)
            await response.write_eof()
            return response
        finally:
            if self.log is not None:
                self.log.write(json.dumps({**entry, "end": time.time()}) + "\n")
                self.log.flush()
            if self.args.die_after and self.answered >= self.args.die_after:
                os._exit(3)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--port", type=int, default=8011)
    out.add_argument("--n", type=int, default=500, help="photo grids that it knows (default: %(default)s)")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--split", choices=photo_grid.SPLITS, default="train")
    out.add_argument("--wrong", type=float, default=0.10, help="fraction of wrong answers (default: %(default)s)")
    out.add_argument("--flawed", type=float, default=0.05, help="fraction of other faults (default: %(default)s)")
    out.add_argument("--errors", type=float, default=0.05, help="fraction of failing attempts (default: %(default)s)")
    out.add_argument("--latency", type=float, default=0.05, help="seconds (default: %(default)s)")
    out.add_argument("--retry-after", type=float, default=1.0, help="seconds that a 429 asks for")
    out.add_argument("--die-after", type=int, default=0, help="end after so many answers (default: never)")
    out.add_argument("--log", help="append every attempt to this jsonl file")
    return out


async def serve(args: argparse.Namespace) -> None:
    """Serve until the process ends."""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(args.log, "a", encoding="utf-8")) if args.log else None
        server = Server(args, log)
        # With this, a client that disconnects cancels its handler, so that the attempt is in the log.
        runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", args.port).start()
        print(f"serving {args.n} photo grids on http://127.0.0.1:{args.port}/v1", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(parser().parse_args()))
