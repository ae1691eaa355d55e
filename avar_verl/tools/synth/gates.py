# SPDX-License-Identifier: Apache-2.0
"""The gates that a sample must pass. Pure functions; near-duplicates and overlap, which compare samples, are in
`duplicates`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from avar_verl.anchors import parse_anchors, to_pixels
from avar_verl.anchors.phrases import Sentences
from avar_verl.rewards.accuracy import grade_answer
from avar_verl.rewards.anchors import anchor_score
from avar_verl.rewards.format import format_score
from avar_verl.rewards.grounding import box_iou
from avar_verl.tools.synth.chain import Progress
from avar_verl.tools.synth.config import GATES, STAGES, SynthConfig
from avar_verl.tools.synth.items import Item
from avar_verl.tools.synth.prompts import parse_chain, parse_description

# Words that show that a text was written from a description.
LEAK_DESCRIPTION = re.compile(
    r"\b(?:the|this|that|your|given|provided|above) (?:\w+ )?(?:description|descriptions|caption|captions)\b"
    r"|\b(?:description|caption) (?:says|states|mentions|notes|tells|gives|lists|of the (?:image|picture|figure))\b"
    r"|\b(?:as|was|were|is|are) (?:described|mentioned|stated) (?:in|by|above|earlier in) (?:the|this) "
    r"(?:text|description|passage|caption)\b"
    r"|\baccording to the (?:text|description|passage|caption)\b|\bas described\b"
    r"|描述(?:中|里|说|提到|显示|指出)|根据(?:图片的?|图像的?)?描述|如描述",
    re.IGNORECASE,
)
# Words that show that a text knew the answer.
LEAK_ANSWER = re.compile(
    r"\b(?:the|this|that) (?:given|known|provided|correct|reference|expected|stated) (?:final )?answer\b"
    r"|\bground[- ]truth\b|\b(?:the|an) answer (?:that )?(?:was|is) (?:given|known|provided|stated)\b"
    r"|\b(?:known|given|supposed) to be (?:the )?(?:right|correct) answer\b"
    r"|(?:给定|已知|提供|标准|正确)的?答案(?:是|为|已)",
    re.IGNORECASE,
)
# Markers of a sentence that checks something again.
REFLECTION = re.compile(
    r"\bwait\b|\bhold on\b|\b(?:double|re)[- ]?check(?:ing)?\b|\blet(?:'s| me| us) (?:\w+ )?(?:check|verify|confirm|"
    r"re-?examine|re-?consider|re-?count|look (?:back|again))\b|\b(?:check|checking|look|looking|count|counting|"
    r"measure|read|reading) (?:\w+ ){0,6}?(?:again|once more)\b|\blook(?:ing)? back\b|\bto (?:verify|make sure)\b"
    r"|\bon second thought\b|\bactually, |\bi (?:made|had) (?:a|an) (?:mistake|error)\b|\bis that right\?"
    r"|等等|等一下|再(?:检查|确认|看|核对|验证)|重新(?:检查|审视|看|核对|计算)|回头看|验证一下|仔细核对",
    re.IGNORECASE,
)
# A check needs content besides its marker: "Wait. Let me check." checks nothing.
MIN_REFLECTION_WORDS = 6
_HAN = re.compile(r"[㐀-䶿一-鿿]")
_NOT_PROSE = re.compile(r"\[[\d.,\s-]+\]|\$[^$]*\$|\\[a-zA-Z]+|[\d_^{}\[\]()=+*/<>|-]+")


@dataclass
class Verdict:
    """The result of an item. `failed`: gate -> reason, in the order of GATES; empty if accepted."""

    failed: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    description: str = ""
    first_reasoning: str = ""
    reasoning: str = ""
    answer: str = ""

    @property
    def gate(self) -> str:
        """The first gate that it fails, "" if none."""
        return next((gate for gate in GATES if gate in self.failed), "")

    @property
    def response(self) -> str:
        """The assistant's turn."""
        return f"<think>{self.reasoning}</think><answer>{self.answer}</answer>"


def count_words(text: str) -> int:
    """Number of words; two Chinese characters count as one.

    >>> count_words("a box at [0, 1]"), count_words("左上角有猫")
    (5, 3)
    """
    han = len(_HAN.findall(text))
    return len(_HAN.sub(" ", text).split()) + (han + 1) // 2


def reflections(text: str) -> list[str]:
    """Sentences of the reasoning that check something again: with a marker, not the first sentence, and with content in
    it or in the next sentence.

    >>> reflections("There is a cat. Wait, let me look again at the top left: it shows a dog.")
    ['Wait, let me look again at the top left: it shows a dog.']
    >>> reflections("Wait, a cat sits at the top left. It is grey. Let me check. Yes.")
    []
    """
    sentences, found = Sentences(text), []
    first_end = sentences.at(0)[1] if text else 0
    for match in REFLECTION.finditer(text):
        start, end = sentences.at(match.start())
        if start < first_end and match.start() < first_end:
            continue
        following = sentences.at(end + 1)[1] if end + 1 < len(text) else end
        sentence = text[start:end].strip()
        if count_words(text[start:following]) >= MIN_REFLECTION_WORDS and sentence not in found:
            found.append(sentence)
    return found


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_probability(text: str, languages: list[str]) -> float:
    """Probability that the prose of a text is in one of these languages (py3langid), in [0, 1].

    Raises:
        ValueError: a language that py3langid does not know.
    """
    ranked = dict(_identifier().rank(_NOT_PROSE.sub(" ", text)))
    unknown = [name for name in languages if name not in ranked]
    if unknown:
        raise ValueError(f"gates.languages must be ISO 639-1 codes of {sorted(ranked)}; got {unknown}. Correct them.")
    return float(sum(ranked[name] for name in languages))


# ---- gates of one sample: why it fails, "" if it does not --------------------------------------------------------


def _format(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    return (
        ""
        if format_score(verdict.response) == 1.0
        else "the composed response is not <think>..</think><answer>..</answer>"
    )


def _answer(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    if grade_answer(verdict.answer, list(item.answers)):
        return ""
    return f"the answer is {verdict.answer[:80]!r}, not {' or '.join(item.answers)[:80]!r}"


def _anchors(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    size = (item.pictures[0].width, item.pictures[0].height) if len(item.pictures) == 1 else None
    score = anchor_score(verdict.response, size, config.output.coordinates, prompt=item.words)
    verdict.numbers |= {
        "anchors": score.num_distinct,
        "anchors_coordinates": score.num_coordinates,
        "anchor_parts": score.parts_covered,
    }
    if score.num_distinct < config.gates.min_anchors:
        return f"{score.num_distinct} distinct references to the image, {config.gates.min_anchors} are needed"
    if score.parts_covered < config.gates.min_parts:
        return f"new references in {score.parts_covered} of 4 parts, {config.gates.min_parts} are needed"
    return ""


def _boxes(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    # With several images, the text does not say which one a box refers to.
    if len(item.pictures) != 1 or not item.boxes or not item.boxes[0] or not config.gates.min_box_iou:
        return ""
    size = (item.pictures[0].width, item.pictures[0].height)
    found = [a for a in parse_anchors(verdict.response, size, config.output.coordinates) if a.kind == "bbox"]
    for anchor in found:
        box = to_pixels(anchor, size, config.output.coordinates)
        best = max(box_iou(box, reference) for reference in item.boxes[0])
        if best < config.gates.min_box_iou:
            text = verdict.response[anchor.start : anchor.end]
            needed = config.gates.min_box_iou
            return f"{text} has an IoU of {best:.2f} with the nearest reference box, {needed:g} is needed"
    return ""


def _reflection(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    found = len(reflections(verdict.reasoning))
    verdict.numbers["reflections"] = found
    if found < config.gates.min_reflections:
        return f"{found} sentences check something again, {config.gates.min_reflections} are needed"
    return ""


def _leak(pattern: re.Pattern) -> Callable[[Verdict, Item, SynthConfig], str]:
    def gate(verdict: Verdict, item: Item, config: SynthConfig) -> str:
        match = pattern.search(verdict.reasoning)
        return f"it says {match[0]!r}" if match else ""

    return gate


def _length(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    words = count_words(verdict.reasoning)
    verdict.numbers["words"] = words
    low, high = config.gates.min_words, config.gates.max_words
    return "" if low <= words <= high else f"{words} words, {low} to {high} are wanted"


def _language(verdict: Verdict, item: Item, config: SynthConfig) -> str:
    wanted = config.gates.languages
    if not wanted:
        return ""
    probability = language_probability(verdict.reasoning, wanted)
    if probability >= config.gates.min_language:
        return ""
    return f"{' or '.join(wanted)} with probability {probability:.2f}, {config.gates.min_language:g} is needed"


_SAMPLE_GATES: dict[str, Callable[[Verdict, Item, SynthConfig], str]] = {
    "format": _format,
    "answer": _answer,
    "anchors": _anchors,
    "boxes": _boxes,
    "reflection": _reflection,
    "leak_description": _leak(LEAK_DESCRIPTION),
    "leak_answer": _leak(LEAK_ANSWER),
    "length": _length,
    "language": _language,
}


def judge(config: SynthConfig, item: Item, progress: Progress) -> Verdict:
    """Verdict on an item from its own content; every gate that can run does, and is recorded under its name."""
    verdict = Verdict()
    for stage, call in progress.calls.items():
        verdict.numbers[f"{stage}_tokens"] = call.output_tokens
    if "describe" in progress.calls:
        verdict.description = parse_description(progress.calls["describe"].text)
    chains = {stage: parse_chain(progress.calls[stage].text) for stage in STAGES[1:] if stage in progress.calls}
    if chains.get("reason"):
        verdict.first_reasoning = chains["reason"][0]
    if item.problem:
        verdict.failed["input"] = item.problem
    elif progress.failure is not None:
        failure = progress.failure
        verdict.failed["call"] = f"{failure.stage}: {failure.reason} (after {failure.attempts} attempts)"
    elif progress.request is not None:
        verdict.failed["call"] = f"{progress.request.stage}: no answer yet"
    elif progress.ended:
        _ended(verdict, progress, chains, item, config)
    else:
        verdict.reasoning, verdict.answer = chains["integrate"]
        for gate, look in _SAMPLE_GATES.items():
            if gate not in config.gates.disabled and (why := look(verdict, item, config)):
                verdict.failed[gate] = why
    return verdict


def _ended(verdict: Verdict, progress: Progress, chains: dict, item: Item, config: SynthConfig) -> None:
    """Record a stage whose answer the next one cannot use."""
    stage = next(reversed(progress.calls))
    if chains.get(stage):
        verdict.reasoning, verdict.answer = chains[stage]
    whys = {
        "refused": "the server's content filter has cut the answer",
        "truncated": f"the answer ran into max_tokens={config.stage(stage).max_tokens}",
        "format": "there is no <reasoning>..</reasoning><answer>..</answer>" if stage != "describe" else "it is empty",
    }
    why = whys.get(progress.ended) or _answer(verdict, item, config)
    verdict.failed[progress.ended] = f"{stage}: {why}"
