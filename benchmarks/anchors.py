# SPDX-License-Identifier: Apache-2.0
"""Time to parse and score the anchors of a response, compared with math-verify grading the same responses.

    python benchmarks/anchors.py [--repeats 200]

Responses of about 2,000 tokens (8 KB) with a correct answer; one core. Medians; the three measurements of a row
alternate.
"""

import argparse
import statistics
import time

from math_verify import parse, verify

from avar_verl.anchors import parse_anchors
from avar_verl.rewards.anchors import anchor_score

STEP = "So the next thing to do is to compare the two lengths and to keep the larger one in mind, since it matters. "
LENGTH = 8000


def response(every: int, reference: str) -> str:
    """Reasoning with a reference in every `every`-th sentence."""
    parts, number = [], 0
    while sum(map(len, parts)) < LENGTH:
        parts.append(STEP + (reference.format(a=40 + 31 * number % 500) if number % every == 0 else ""))
        number += 1
    return "<think>" + "".join(parts) + "</think><answer>\\boxed{\\frac{3}{4}}</answer>"


RESPONSES = {
    "no reference": response(10**9, ""),
    "8 boxes": response(9, '{{"bbox_2d": [{a}, 60, 640, 700], "label": "cup"}} '),
    "8 boxes and 8 phrases": response(9, 'In the image there is a cup: {{"bbox_2d": [{a}, 60, 640, 700]}} '),
    "a phrase per sentence": response(1, "In the image there is a cup. "),
    "a box per sentence": response(1, '{{"bbox_2d": [{a}, 60, 640, 700], "label": "cup"}} '),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    gold = parse("\\boxed{\\frac{3}{4}}")
    work = {
        "parse": parse_anchors,
        "parse and score": lambda text: anchor_score(text, (800, 800), "absolute"),
        "math-verify": lambda text: verify(gold, parse(text)),
    }
    print("| response | characters | " + " | ".join(f"{name}, ms" for name in work) + " |")
    print("| --- | --- |" + " --- |" * len(work))
    for name, text in RESPONSES.items():
        seconds: dict[str, list[float]] = {key: [] for key in work}
        for turn in range(arguments.repeats + 5):
            for key, function in work.items():
                start = time.perf_counter()
                function(text)
                if turn >= 5:
                    seconds[key].append(time.perf_counter() - start)
        row = " | ".join(f"{1000 * statistics.median(seconds[key]):.2f}" for key in work)
        print(f"| {name} | {len(text)} | {row} |", flush=True)


if __name__ == "__main__":
    main()
