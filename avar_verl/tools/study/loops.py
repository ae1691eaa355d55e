# SPDX-License-Identifier: Apache-2.0
"""Cold start, GRPO and measurements of the study as plain loops: one process, one model, no launcher.

A run of the study is a minute of computing, which verl's launchers would double. The objectives, masses, rewards and
advantages are those of the engine and the trainer (`objectives`, `attention`), and the losses are verl's: the tests
compare both with the engine.

Shape suffixes:
    B = samples, S = positions, T = response positions, L = layers, H = query heads, R = token roles, F = VISUAL_FIELDS
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import get_cosine_schedule_with_warmup

from avar_verl.attention import capture_mass
from avar_verl.intervention.transformers_hook import generate as generate_under
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.model.corrupt import blank
from avar_verl.model.freeze import freeze_vision
from avar_verl.model.render import PER_TOKEN, Rendered, render
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.agto import agto_terms, mean_over_queries
from avar_verl.objectives.dependency import mean_dependency, token_dependency
from avar_verl.objectives.groups import group_normalize
from avar_verl.objectives.vars import VISUAL_FIELDS, VISUAL_ROLES, VisualReduction, visual_fields
from avar_verl.rewards.accuracy import extract_answer, grade_answer
from avar_verl.tools.demo import lazy_task, photo_grid
from avar_verl.tools.demo.photo_grid import Sample
from avar_verl.tools.rows import conversation
from reward_fns import avar, visual_anchor

EPSILON = 1e-6
# Of a response; reference responses are shorter.
MAX_NEW_TOKENS = 72


@dataclass(frozen=True)
class Batch:
    """Samples with responses: model inputs, roles (B, S) and which positions are response tokens."""

    inputs: dict[str, torch.Tensor]
    roles_BS: torch.Tensor

    @property
    def response_BS(self) -> torch.Tensor:
        return self.roles_BS == TokenRole.RESPONSE


def prompt_of(checkpoint: Checkpoint, sample: Sample) -> Rendered:
    """The question, rendered with the header of the answer."""
    return render(checkpoint.processor, conversation(sample.row).prompt, add_generation_prompt=True)


def chain_of(checkpoint: Checkpoint, sample: Sample) -> Rendered:
    """The question and its reference response."""
    return render(checkpoint.processor, conversation(sample.row).answered())


def batch_of(checkpoint: Checkpoint, samples: Sequence[Rendered], prompts: Sequence[int] | None = None) -> Batch:
    """A right-padded batch; `prompts` are the lengths of prompts after which all tokens are response."""
    inputs = checkpoint.collate(samples)
    response_BS = None
    if prompts is not None:
        response_BS = torch.arange(inputs["input_ids"].shape[1]) >= torch.tensor(prompts)[:, None]
        response_BS &= inputs["attention_mask"].bool()
    return Batch(inputs, checkpoint.role_map(inputs["input_ids"], inputs["attention_mask"], response_BS))


def log_probs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, S) log-probability of every token given those before it; 0 at position 0."""
    logits_BSV = model(**inputs, use_cache=False).logits[:, :-1].float()
    chosen_BS = logits_BSV.gather(2, inputs["input_ids"][:, 1:, None])[..., 0] - logits_BSV.logsumexp(2)
    return torch.nn.functional.pad(chosen_BS, (1, 0))


# ---- cold start ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColdStart:
    """Settings of a cold start."""

    steps: int
    batch_size: int = 28
    lr: float = 4e-3
    """Peak of a one-cycle schedule: a linear warm-up over a tenth of the steps, then a half cosine to 0."""

    alpha: float = 0.0
    image_target: float | None = 0.4
    query: TokenRole = TokenRole.RESPONSE


def cold_start_loss(checkpoint: Checkpoint, batch: Batch, settings: ColdStart) -> torch.Tensor:
    """`L_LM + alpha * L_enhance`: a mean over response tokens, and over samples with an image."""
    mask_BS = batch.response_BS
    if settings.alpha == 0:
        return -(log_probs(checkpoint.model, batch.inputs) * mask_BS).sum() / mask_BS.sum()
    with capture_mass(
        checkpoint.model, batch.roles_BS, query_role=settings.query, reduction=mean_over_queries
    ) as captured:
        logs_BS = log_probs(checkpoint.model, batch.inputs)
    terms = agto_terms(
        torch.stack(captured.per_layer(), dim=1),
        captured.roles,
        captured.valid,
        EPSILON,
        settings.image_target,
    )
    guided = terms.enhance_B.sum() / terms.has_enhance_B.sum().clamp(min=1)
    return -(logs_BS * mask_BS).sum() / mask_BS.sum() + settings.alpha * guided


def cold_start(checkpoint: Checkpoint, chains: Sequence[Rendered], settings: ColdStart, seed: int) -> Iterator[float]:
    """Train on shuffled epochs of `chains`; yields the loss of every step."""
    model = checkpoint.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    order, rng = [], np.random.default_rng([seed, 2])
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = list(rng.permutation(len(chains)))
        chosen, order = order[: settings.batch_size], order[settings.batch_size :]
        loss = cold_start_loss(checkpoint, batch_of(checkpoint, [chains[index] for index in chosen]), settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield float(loss.detach())
    model.eval()


# ---- responses -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """Responses to prompts, as a batch, and what they say."""

    batch: Batch
    texts: list[str]
    correct_B: torch.Tensor
    looks_B: torch.Tensor


@torch.no_grad()
def answer(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    prompts: Sequence[Rendered],
    max_new_tokens: int,
    sampled: bool = False,
    spec: str | None = None,
) -> Answered:
    """Greedy or sampled responses (temperature 1, the whole distribution) to one batch of prompts."""
    inputs = checkpoint.prompts(prompts)
    settings = {"do_sample": sampled, "max_new_tokens": max_new_tokens}
    settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    settings["suppress_tokens"] = list(checkpoint.role_map.image_token_ids)
    if spec is None:
        ids_BS = checkpoint.model.generate(**inputs, **settings)
    else:
        ids_BS = generate_under(checkpoint.model, checkpoint.role_map, spec, inputs, **settings)
    responses = [ids for ids, _ in checkpoint.responses(ids_BS, inputs["input_ids"].shape[1])]
    whole = [
        replace(prompt, ids_S=torch.cat([prompt.ids_S, prompt.ids_S.new_tensor(ids)]))
        for prompt, ids in zip(prompts, responses, strict=True)
    ]
    texts = checkpoint.processor.tokenizer.batch_decode(responses, skip_special_tokens=True)
    found = [extract_answer(text) for text in texts]
    correct = [one is not None and grade_answer(one, sample.answer) for one, sample in zip(found, samples, strict=True)]
    return Answered(
        batch_of(checkpoint, whole, [len(prompt.ids_S) for prompt in prompts]),
        texts,
        torch.tensor(correct),
        torch.tensor([lazy_task.looks(text) for text in texts]),
    )


@torch.no_grad()
def dependency(checkpoint: Checkpoint, batch: Batch, logs_BS: torch.Tensor) -> torch.Tensor:
    """(B,) visual dependency of the responses, whose log-probabilities are `logs_BS`; the image is blanked."""
    features = {key: value for key, value in batch.inputs.items() if key not in PER_TOKEN}
    blank_BS = log_probs(checkpoint.model, {**batch.inputs, **blank(features)})
    return mean_dependency(token_dependency(logs_BS, blank_BS), batch.response_BS)


@torch.no_grad()
def measured(checkpoint: Checkpoint, batch: Batch, query: TokenRole = TokenRole.RESPONSE) -> tuple[torch.Tensor, Any]:
    """(B, F) VISUAL_FIELDS of the queries of a role, and (B, S) log-probabilities of the same pass."""
    reduction = VisualReduction(EPSILON)
    with capture_mass(
        checkpoint.model, batch.roles_BS, query_role=query, reduction=reduction, columns=VISUAL_ROLES
    ) as captured:
        logs_BS = log_probs(checkpoint.model, batch.inputs)
    return visual_fields(captured.per_layer(), captured.roles, captured.valid), logs_BS


# ---- reinforcement -------------------------------------------------------------------------------------------------

# What r_visual can be, beside nothing: fields of the masses, visual dependency, or the anchors in the text.
MASSES = ("ratio", "image_share", "image_mass")
VISUAL = (*MASSES, "dependency", "visual_anchor")
NORMALIZATIONS = ("sum_then_normalize", "normalize_then_sum", "no_std")


@dataclass(frozen=True, kw_only=True)
class Grpo:
    """GRPO with one update per batch of rollouts; no KL, no entropy bonus; vision tower and projector are frozen."""

    steps: int = 20
    prompts: int = 16
    rollouts: int = 8
    lr: float = 1e-4
    lambda_v: float = 0.3
    visual: str | None = None
    """r_visual, one of VISUAL; null for accuracy and format alone."""

    normalization: str = "sum_then_normalize"
    """One of NORMALIZATIONS: the group's standard deviation of the summed reward (verl's), of each part, or none
    (Dr.GRPO).
    """

    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self):
        for name, known in (("visual", (None, *VISUAL)), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}. Name one.")


def visual_statistic(
    checkpoint: Checkpoint, rollouts: Answered, logs_BS: torch.Tensor, samples: Sequence[Sample], visual: str
) -> torch.Tensor:
    """(B,) the statistic `visual` of VISUAL, not gated; `logs_BS` are the log-probabilities of the rollouts."""
    if visual == "visual_anchor":
        info = {"image_sizes": [(photo_grid.IMAGE_SIZE,) * 2]}
        pairs = zip(rollouts.texts, samples, strict=True)
        return torch.tensor(
            [
                visual_anchor.compute_score(
                    lazy_task.DATA_SOURCE, text, sample.answer, {**info, "prompt_text": sample.question}
                )["anchor"]
                for text, sample in pairs
            ]
        )
    if visual == "dependency":
        return dependency(checkpoint, rollouts.batch, logs_BS)
    return measured(checkpoint, rollouts.batch)[0][:, VISUAL_FIELDS.index(visual)]


def advantages(score_B: torch.Tensor, visual_B: torch.Tensor, group_B: torch.Tensor, settings: Grpo) -> torch.Tensor:
    """(B,) advantage of every rollout from its score and its gated r_visual, without lambda_v."""
    if settings.normalization == "normalize_then_sum":
        return group_normalize(score_B, group_B) + settings.lambda_v * group_normalize(visual_B, group_B)
    total_B = score_B + settings.lambda_v * visual_B
    if settings.normalization == "sum_then_normalize":
        return group_normalize(total_B, group_B)
    sums_N = torch.zeros(int(group_B.max()) + 1).index_add_(0, group_B, total_B)
    return total_B - (sums_N / group_B.bincount())[group_B]


def grpo(checkpoint: Checkpoint, samples: Sequence[Sample], settings: Grpo, seed: int) -> Iterator[dict[str, float]]:
    """Train on shuffled epochs of the prompts of `samples`; yields the means of every step.

    Rollouts are sampled with torch's global generator, which is seeded here.
    """
    torch.manual_seed(seed)
    model, rng = checkpoint.model, np.random.default_rng([seed, 3])
    freeze_vision(model, model.config.model_type, tower=True, projector=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    prompts, order = [prompt_of(checkpoint, sample) for sample in samples], []
    group_B = torch.arange(settings.prompts).repeat_interleave(settings.rollouts)
    for _ in range(settings.steps):
        if len(order) < settings.prompts:
            order = list(rng.permutation(len(samples)))
        chosen, order = order[: settings.prompts], order[settings.prompts :]
        index = [one for one in chosen for _ in range(settings.rollouts)]
        asked = [samples[one] for one in index]
        rollouts = answer(checkpoint, asked, [prompts[one] for one in index], settings.max_new_tokens, sampled=True)
        logs_BS = log_probs(model, rollouts.batch.inputs)
        score_B = torch.tensor(
            [
                avar.compute_score(lazy_task.DATA_SOURCE, text, sample.answer)["score"]
                for text, sample in zip(rollouts.texts, asked, strict=True)
            ]
        )
        visual_B = torch.zeros_like(score_B)
        if settings.visual is not None:
            raw_B = visual_statistic(checkpoint, rollouts, logs_BS.detach(), asked, settings.visual)
            visual_B = raw_B.where(rollouts.correct_B, 0.0).float()
        advantage_B = advantages(score_B, visual_B, group_B, settings)
        mask_BS = rollouts.batch.response_BS
        # One update per batch: the ratio to the policy that sampled is 1, and nothing is clipped.
        ratio_BS = torch.exp(logs_BS - logs_BS.detach())
        loss = -(ratio_BS * advantage_B[:, None] * mask_BS).sum() / mask_BS.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield {
            "accuracy": float(rollouts.correct_B.float().mean()),
            "looks": float(rollouts.looks_B.float().mean()),
            "visual": float(visual_B.mean()),
            "tokens": float(mask_BS.sum(1).float().mean()),
            "surprise": float(-(logs_BS.detach() * mask_BS).sum() / mask_BS.sum()),
        }
