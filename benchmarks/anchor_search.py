# SPDX-License-Identifier: Apache-2.0
"""Adversarial search of the anchor reward: is there a response without reading that earns more than an honest one?

    python benchmarks/anchor_search.py [--seconds 3600] [--tries N] [--seed 0] [--output finds.json]

A response without reading is made of what needs no image: references (boxes, points and stock phrases such as "look at
the top of the picture") with at most one label each, separators, noise, numbers, words of the question, and stock
sentences of reasoning, also cut in the middle of a word, and made-up words. It has no word that describes what is at a
place, other than the labels, of which every written box has one in its syntax and one before it at most. Its answer is
right, so that the reward is paid.

Hill climbing with restarts: an edit that does not lower the reward is kept. Edits change the number of references,
spacing, labels, filler, order, jitter, repetition, borrowed words of the question, syntax, and letters (case, width,
invisible characters, cuts, made-up words). With `--tries`, the result depends on the seed and the number of tries only.

Prints the best find of every restart that improves on the earlier ones, and exits with 1 if one of them earns more than
the honest response with two references.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

from avar_verl.rewards.anchors import anchor_score
from reward_fns.visual_anchor import compute_score

SIZE = (640, 480)
QUESTION = "In the image, how many cups are there on the table? Look at the picture and answer with a number."
INFO = {"image_sizes": [SIZE], "prompt_text": QUESTION}
HONEST = (
    "<think>In the image, three white cups stand on a wooden shelf. The fourth one is at "
    '{"bbox_2d": [300, 60, 390, 120], "label": "cup"}, half hidden by a blue kettle. So there are four.</think>'
    "<answer>4</answer>"
)
"""A phrase and a box, in different parts of the reasoning."""

LABELS = (
    "cup cups mug table dog cat car tree person man woman chair lamp plate bottle bird book door window "
    "clock phone sign bus train boat horse sheep cow bear kite ball bowl fork spoon knife pizza cake bed "
    "sofa vase shoe hat bag box object item thing region area target point 杯子 狗 猫 车 人 桌子 "
).split()
FILLER = """
Let me think about this step by step.
So the next thing to do is to count.
Then the next thing to do is to count what stands there and to keep the number in mind.
And so on and so forth.
I will proceed carefully and verify each step before moving on.
First, I need to understand what the question is asking for.
Let me double-check my reasoning before giving the final answer.
This is an important detail that should not be overlooked.
Now consider the other possibilities and rule them out one by one.
It is worth noting that everything seems consistent so far.
Wait, let me reconsider that for a moment.
Okay, that makes sense.
Hmm, I am not entirely sure, so I will go over it once more.
Having established that, I can continue with the remaining part.
The evidence so far points in the same direction.
As a sanity check, I repeat the previous step.
There might be something that I have missed.
Taking everything into account, the conclusion follows directly.
Let us break the problem down into smaller pieces.
I should be systematic here and avoid making mistakes.
Moving on to the next one.
Here is another one.
And one more.
Alright, what else is there?
At this point I feel fairly confident about the outcome.
To be thorough, I also want to look at it from a different perspective.
It could also be the case that the opposite holds, but that is unlikely.
With that in mind, I can narrow down the answer.
Putting it all together gives the final result.
Nothing else stands out, so I will leave it at that.
Fortunately the rest is straightforward.
Before jumping to conclusions, I want to be careful about the wording of the query.
Interesting.
Great, we are almost done.
Based on the above observations, the analysis is complete.
The same logic applies again, as expected.
I have to pay close attention to every detail.
On second thought, that was fine after all.
Step one is done; step two follows.
Let me summarize what we have learned up to now.
This confirms my initial hunch.
Without further ado, let me proceed.
The user wants a short and accurate reply.
I recall the instructions and follow them closely.
Accordingly, the value must be updated.
That leaves only a handful of scenarios to discuss.
Let me start from scratch and work through it slowly.
Each of these matters for the overall tally.
In other words, the total stays the same.
Such a scene requires a methodical approach.
让我一步一步地思考这个问题。
接下来需要仔细检查一下。
首先我们来看看题目要求什么。
综上所述，答案已经很清楚了。
再确认一遍，没有问题。
然后继续下一步的分析。
""".strip().splitlines()
LOOKS = "look at|look again at|examine|zoom in on|inspect|check|focus on|study|return to|see".split("|")
NOUNS = "image picture photo figure screenshot scene map chart screen photograph diagram".split()
SUBJECTS = (
    "the image shows|the picture contains|in the image|from the photo|as shown in the figure|in this picture".split("|")
)
PLACES = (
    "|the top of |the left side of |the bottom right corner of |the center of |the background of |the upper part of "
).split("|")
CHINESE = ("再看一下图片", "从图中可以看出", "图片显示", "仔细观察图像左上角", "图中有", "根据图片")
SEPARATORS = (
    " --- ",
    "\n",
    "\n\n",
    " | ",
    " ... ",
    " , ",
    " ; ",
    " *** ",
    " => ",
    "\n- ",
    "\n1. ",
    " • ",
    " 1 2 3 4 ",
    "。",
    " / ",
)
NOISE = (
    "xkcd ",
    "aaa ",
    "bcdf ",
    "x7 q9 ",
    "a b c d ",
    "zzzz ",
    "#ff00aa ",
    "0x3f ",
    "mmm ",
    "la la la ",
    "ha ha ",
    "\u200b",
)
SYLLABLES = (
    "ba be bli bro da del fa fen gor ha ing ka kro la lim ma mel na no or pa per qui ra ri sol ta tre ul vi".split()
)
SYNTAX = (
    '{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "{label}"}}',
    '{{"label": "{label}", "bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}',
    "{{'bbox_2d': [{x1}, {y1}, {x2}, {y2}], 'label': '{label}'}}",
    "<ref>{label}</ref><box>({x1},{y1}),({x2},{y2})</box>",
    "<box>[{x1},{y1},{x2},{y2}]</box>",
    "at [{x1}, {y1}, {x2}, {y2}]",
    "`[{x1}, {y1}, {x2}, {y2}]`",
    '{{"point_2d": [{x1}, {y1}], "label": "{label}"}}',
    '{{"xmin": {x1}, "ymin": {y1}, "xmax": {x2}, "ymax": {y2}, "label": "{label}"}}',
    "{label}<loc_{x1}><loc_{y1}><loc_{x2}><loc_{y2}>",
    '<point x="{x1}" y="{y1}" alt="{label}">{label}</point>',
)
MOST_SEGMENTS = 220

Segment = tuple
"""("box", syntax, x1, y1, x2, y2, label, name before it, number) or ("text", text)."""


def random_box(rng: random.Random) -> Segment:
    x1, y1 = rng.randrange(0, 560), rng.randrange(0, 400)
    x2, y2 = x1 + rng.randrange(8, 80), y1 + rng.randrange(8, 80)
    name = rng.choice((*LABELS, "", "", ""))
    return (
        "box",
        rng.randrange(len(SYNTAX)),
        x1,
        y1,
        x2,
        y2,
        rng.choice(LABELS),
        name,
        rng.choice((0, 0, rng.randrange(99))),
    )


def random_phrase(rng: random.Random) -> Segment:
    kind = rng.randrange(4)
    if kind == 0:
        return ("text", rng.choice(CHINESE) + rng.choice("，。"))
    if kind == 1:
        return ("text", rng.choice(SUBJECTS).capitalize() + rng.choice((", ", " ", ": ")))
    start = rng.choice(("I ", "Let me ", "", "Now I ", "We "))
    end = rng.choice((". ", ": ", ", ", " again. "))
    return ("text", f"{start}{rng.choice(LOOKS)} {rng.choice(PLACES)}the {rng.choice(NOUNS)}{end}")


def made_up_words(rng: random.Random) -> str:
    return "".join(
        "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 5))) + rng.choice((" ", " ", ". "))
        for _ in range(rng.randrange(1, 6))
    )


def random_text(rng: random.Random) -> Segment:
    kind = rng.randrange(9)
    if kind < 4:
        return ("text", rng.choice(FILLER) + " ")
    if kind == 8:
        return ("text", made_up_words(rng))
    if kind == 4:
        return ("text", rng.choice(SEPARATORS) * rng.randrange(1, 6))
    if kind == 5:
        return ("text", rng.choice(NOISE) * rng.randrange(1, 4))
    words = QUESTION.split()
    start = rng.randrange(len(words))
    return ("text", " ".join(words[start : start + rng.randrange(1, 9)]) + " ")


def random_segment(rng: random.Random) -> Segment:
    return rng.choice((random_box, random_box, random_phrase, random_text, random_text))(rng)


def render(segments: list[Segment]) -> str:
    parts = []
    for segment in segments:
        if segment[0] == "text":
            parts.append(segment[1])
            continue
        _, syntax, x1, y1, x2, y2, label, name, number = segment
        suffix = f" {number}" if number else ""
        box = SYNTAX[syntax].format(x1=x1, y1=y1, x2=x2, y2=y2, label=label + suffix)
        named = name and not SYNTAX[syntax].startswith("{label}")
        parts.append((name + suffix + " " if named else "") + box + " ")
    return "<think>" + "".join(parts) + "</think><answer>4</answer>"


def start_response(rng: random.Random) -> list[Segment]:
    """A list, a spread list, filler with references, or anything."""
    kind = rng.randrange(4)
    boxes = [random_box(rng) for _ in range(rng.choice((2, 4, 8, 30, 100)))]
    if kind == 0:
        return boxes
    if kind == 1:
        return [item for box in boxes for item in (box, random_text(rng))]
    if kind == 2:
        return [item for box in boxes[:8] for item in (random_phrase(rng), box, random_text(rng), random_text(rng))]
    return [random_segment(rng) for _ in range(rng.randrange(2, 40))]


def edit(segments: list[Segment], rng: random.Random) -> list[Segment]:
    """One random edit."""
    out = list(segments) or [random_segment(rng)]
    at = rng.randrange(len(out))
    kind = rng.randrange(14)
    if kind == 0:  # count
        out.insert(at, random_segment(rng))
    elif kind == 1:
        del out[at : at + rng.choice((1, 1, 1, 2, 5, 20))]
    elif kind == 2:
        out[at:at] = [random_box(rng) for _ in range(rng.choice((1, 3, 10, 40)))]
    elif kind == 3:  # spacing
        out.insert(at, random_text(rng))
    elif kind == 4:
        space = random_text(rng)
        out = [item for segment in out for item in ((segment, space) if segment[0] == "box" else (segment,))]
    elif kind == 5:  # filler
        out[at] = random_text(rng)
    elif kind == 6:
        out[at] = random_phrase(rng)
    elif kind == 7:  # order
        other = rng.randrange(len(out))
        out[at], out[other] = out[other], out[at]
    elif kind == 8:
        end = at + rng.randrange(1, 12)
        part = out[at:end]
        del out[at:end]
        where = rng.randrange(len(out) + 1)
        out[where:where] = part
    elif kind == 9:
        rng.shuffle(out)
    elif kind == 10:  # repetition
        where = rng.randrange(len(out) + 1)
        out[where:where] = out[at : at + rng.randrange(1, 8)]
    elif kind in (11, 12):  # labels, syntax, jitter
        boxes = [i for i, segment in enumerate(out) if segment[0] == "box"]
        if boxes:
            which = boxes if rng.random() < 0.2 else [rng.choice(boxes)]
            syntax = rng.randrange(len(SYNTAX))
            change, shift = rng.randrange(4), rng.choice((1, 5, 20, 60))
            for i in which:
                _, old, x1, y1, x2, y2, label, name, number = out[i]
                if change == 0:
                    label, number = rng.choice(LABELS), rng.choice((0, i))
                elif change == 1:
                    name = rng.choice((*LABELS, ""))
                elif change == 2:
                    old = syntax
                else:
                    dx, dy = rng.randint(-shift, shift), rng.randint(-shift, shift)
                    x1, y1, x2, y2 = x1 + dx, y1 + dy, x2 + dx, y2 + dy
                    if min(x1, y1) < 0:
                        continue
                out[i] = ("box", old, x1, y1, x2, y2, label, name, number)
    else:  # letters
        if out[at][0] == "text":
            text = out[at][1]
            where = rng.randrange(len(text) + 1)
            words = text.split(" ")
            text = rng.choice(
                (
                    text.upper(),
                    text.lower(),
                    text.title(),
                    text[:where] + "\u200b" + text[where:],
                    text[:where],
                    text[where:],
                    text[:where] + made_up_words(rng) + text[where:],
                    text + text,
                    " ".join(words[: rng.randrange(len(words) + 1)]) + " ",
                )
            )
            out[at] = ("text", text or " ")
    return out[:MOST_SEGMENTS]


def reward(text: str) -> float:
    """`compute_score` of a response with a right answer and layout, without grading it again."""
    return 1.1 + 0.3 * anchor_score(text, SIZE, "absolute", QUESTION).score


def full_reward(text: str) -> float:
    return compute_score("cups", text, "4", INFO, coordinates="absolute")["score"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="time limit")
    parser.add_argument("--tries", type=int, default=None, help="number of responses scored; the default has no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=int, default=600, help="edits without a gain before a restart")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the best finds")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    honest = full_reward(HONEST)
    print(f"honest, a phrase and a box: {honest:.4f}", flush=True)
    end = time.monotonic() + arguments.seconds
    limit = float("inf") if arguments.tries is None else arguments.tries
    tries = restarts = 0
    finds: list[dict] = []
    top = 0.0
    reported = time.monotonic()
    while tries < limit and time.monotonic() < end:
        restarts += 1
        current = start_response(rng)
        text = render(current)
        score, idle = reward(text), 0
        tries += 1
        while idle < arguments.patience and tries < limit and time.monotonic() < end:
            changed = current
            for _ in range(rng.choice((1, 1, 2, 3))):
                changed = edit(changed, rng)
            candidate = render(changed)
            value = reward(candidate)
            tries += 1
            idle = 0 if value > score + 1e-9 else idle + 1
            if value > score + 1e-9 or value > score - 1e-9 and len(candidate) <= len(text) + 200:
                current, text, score = changed, candidate, value
        finds.append({"score": full_reward(text), "tries": tries, "restart": restarts, "text": text})
        finds.sort(key=lambda find: (-find["score"], len(find["text"])))
        del finds[20:]
        if finds[0]["score"] > top + 1e-9:
            top = finds[0]["score"]
            print(f"{tries:9d} tries, {restarts:5d} restarts: {top:.4f}  {finds[0]['text'][:2000]!r}", flush=True)
        if time.monotonic() - reported > 300:
            reported = time.monotonic()
            print(
                f"{tries:9d} tries, {time.process_time():.0f} s of CPU: best {top:.4f}, honest {honest:.4f}", flush=True
            )
            if arguments.output:
                arguments.output.write_text(json.dumps(finds, ensure_ascii=False, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(finds, ensure_ascii=False, indent=1))
    verdict = "more than" if top > honest + 1e-9 else "no more than"
    print(
        f"{tries} tries, {restarts} restarts, {time.process_time():.0f} s of CPU: "
        f"the best find earns {top:.4f}, {verdict} the honest {honest:.4f}"
    )
    return int(top > honest + 1e-9)


if __name__ == "__main__":
    sys.exit(main())
