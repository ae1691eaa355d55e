# SPDX-License-Identifier: Apache-2.0
"""From conversations to records: one forward pass per batch, with masses reduced to sums in each layer, and with
`corruption` a second one for the visual dependency of the responses.

Shape suffixes:
    B = samples, S = positions, T = response tokens, V = vocabulary, Q = selected queries, L = measured layers,
    H = query heads, I = images of a sample, G = groups of queries (user, then bins of positions in the response),
    C = key groups, K = statistics
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from avar_verl.attention import capture_mass
from avar_verl.attention.capture import select_queries
from avar_verl.model import corrupt
from avar_verl.model.checkpoint import Checkpoint, generate_ids
from avar_verl.model.families import Family
from avar_verl.model.layers import select_layers
from avar_verl.model.render import Rendered, render
from avar_verl.model.responses import response_mask
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.dependency import CORRUPTIONS, token_dependency
from avar_verl.tools.rows import Conversation

QUERIES = {"user": TokenRole.USER, "response": TokenRole.RESPONSE}
# First positions of the bins of a response, two per octave, the last one open: attention to the image fades with
# length.
BIN_STARTS = (0, 4, *(edge for power in range(3, 18) for edge in (2**power, 3 * 2 ** (power - 1))))
SUMS = ("ratio", "share", "image", "system")
DEPENDENCY = "dependency"
NO_IMAGE, NO_SYSTEM = "no image", "no system turn"
NO_QUERY = {"user": "no user token", "response": "no response"}
NUM_ROLES = len(TokenRole)


def measurable_layers(family: Family, config, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Ascending layers to measure, default all with a full softmax (`model.layers`).

    Raises:
        ValueError: a family without the ratio, or anything that `select_layers` refuses.
    """
    if family.cross_attention:
        raise ValueError(
            "VAS needs image and system keys in one softmax; got "
            f"model_type={config.model_type!r}, which reads images in cross-attention layers: image mass over system "
            "mass is a division by zero there and zero elsewhere, whatever the weights (docs/families.md). There is no "
            "VAS of this family. Measure how its responses depend on the image: --query none --dependency blank."
        )
    return select_layers(config.get_text_config(), layers)


@dataclass(frozen=True)
class LabelledSample:
    """A rendered conversation and the roles of its tokens.

    `tokens_I` are the numbers of image tokens per image; `response_ids` the response if generated or given as ids, None
    if it is text.
    """

    rendered: Rendered
    roles_S: torch.Tensor
    tokens_I: tuple[int, ...]
    response_ids: list[int] | None

    @property
    def skipped(self) -> str | None:
        """Why the sample has no VAS for any query; None if it may have one."""
        roles = set(self.roles_S.tolist())
        return NO_IMAGE if TokenRole.IMAGE not in roles else NO_SYSTEM if TokenRole.SYSTEM not in roles else None

    @property
    def without_dependency(self) -> str | None:
        """Why the sample has no visual dependency; None if it has one. It needs no system turn and no image tokens."""
        has_response = bool((self.roles_S == TokenRole.RESPONSE).any())
        return NO_IMAGE if not self.tokens_I else None if has_response else NO_QUERY["response"]


def image_features(processor, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """What the processor makes of images, whatever the text around them; {} without an image."""
    return _images_alone(processor, images).features if images else {}


def _images_alone(processor, images: Sequence[Image.Image]) -> Rendered:
    blocks = [{"type": "image", "image": image} for image in images]
    return render(processor, [{"role": "user", "content": [*blocks, {"type": "text", "text": "."}]}])


def tokens_by_image(checkpoint: Checkpoint, conversation: Conversation, rendered: Rendered, total: int) -> list[int]:
    """Number of the `total` image tokens that belong to each image, in order.

    Computed from the family's places, or else by rendering every image separately.

    Raises:
        ValueError: the counts do not add up to the tokens of the conversation.
    """
    images, family = conversation.images, checkpoint.family
    if len(images) < 2:
        return [total] * len(images)
    if family.places is not None:
        places = family.image_places(checkpoint.processor, rendered.features, [image.size for image in images])
        counts = [len(places_N4) for places_N4 in places]
    else:
        counts = []
        for image in images:
            ids_S = _images_alone(checkpoint.processor, [image]).ids_S
            is_image_S = torch.isin(ids_S, ids_S.new_tensor(checkpoint.role_map.image_token_ids))
            counts.append(int(is_image_S.sum()))
    if len(counts) != len(images) or sum(counts) != total:
        raise ValueError(
            f"the image tokens of a sample must be those of its images; got {total} tokens for {len(images)} images of "
            f"{counts}. Take processor and tokenizer from one checkpoint."
        )
    return counts


class Scorer:
    """`Scorer(checkpoint, ...)`: `samples = prepare(conversations)`, then `score(samples)`.

    Args:
        queries: of QUERIES.
        layers: see `measurable_layers`.
        max_new_tokens: None measures the response in the conversation; a number generates one first.
        padding_side: of the measured batches; the numbers do not depend on it.
        corruption: of CORRUPTIONS; None measures no dependency.

    Raises:
        ValueError: anything that `measurable_layers` or `corrupt.check_blank` refuses, or an unknown corruption.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        queries: Sequence[str] = tuple(QUERIES),
        layers: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        padding_side: str = "right",
        corruption: str | None = None,
    ):
        self.checkpoint, self.queries, self.corruption = checkpoint, tuple(queries), corruption
        self.layers = measurable_layers(checkpoint.family, checkpoint.model.config, layers) if queries else ()
        self.max_new_tokens, self.padding_side = max_new_tokens, padding_side
        if corruption not in (None, *CORRUPTIONS):
            raise ValueError(f"corruption must be one of {CORRUPTIONS}; got {corruption!r}. Name one.")
        if corruption == "blank":
            corrupt.check_blank(checkpoint.processor)

    # ---- rendering ---------------------------------------------------------------------------------------------

    def _render(self, conversation: Conversation, messages: list[dict], answered: bool) -> Rendered:
        return render(
            self.checkpoint.processor,
            messages,
            add_generation_prompt=not answered,
            template_kwargs=conversation.template_kwargs,
        )

    def prepare(self, conversations: Sequence[Conversation]) -> list[LabelledSample]:
        """Conversations as samples; with `max_new_tokens`, responses are generated in one batch.

        Raises:
            ValueError: a response of ids that contains image placeholders, or anything that cannot be rendered.
        """
        if self.max_new_tokens is None:
            return [self._given(conversation) for conversation in conversations]
        prompts = [self._render(one, one.prompt, answered=False) for one in conversations]
        responses = generate_ids(self.checkpoint, prompts, self.max_new_tokens)
        return [self._with_ids(*parts) for parts in zip(conversations, prompts, responses, strict=True)]

    def _given(self, conversation: Conversation) -> LabelledSample:
        if conversation.response_ids is not None:
            prompt = self._render(conversation, conversation.prompt, answered=False)
            return self._with_ids(conversation, prompt, conversation.response_ids)
        answered = conversation.response is not None
        messages = conversation.answered()
        rendered = self._render(conversation, messages, answered)
        roles_S = self._roles(rendered.ids_S)
        if answered:  # The roles of training.
            parts = (self.checkpoint.processor, self.checkpoint.role_map, messages, rendered)
            roles_S = self._roles(rendered.ids_S, response_mask(*parts, conversation.template_kwargs))
        else:  # What a generation prompt opens, such as `<think>`, is no response.
            opened_S = (roles_S == TokenRole.RESPONSE).flip(0).cumprod(0).flip(0).bool()
            roles_S = roles_S.masked_fill(opened_S, TokenRole.OTHER)
        if not conversation.turns:
            roles_S = _without_earlier_turns(roles_S, answered)
        return self._sample(conversation, rendered, roles_S, None)

    def _with_ids(self, conversation: Conversation, prompt: Rendered, response_ids: list[int]) -> LabelledSample:
        """The response is whatever was generated, whatever its ids."""
        placeholders = sorted(set(response_ids) & set(self.checkpoint.role_map.image_token_ids))
        if placeholders:
            raise ValueError(
                f"a response must not hold image placeholders, which have no image; got the ids {placeholders}. "
                "Generate without them (avar_verl.plugin.rollout.agent_loop.forbid), or leave the row out."
            )
        ids_S = torch.cat([prompt.ids_S, prompt.ids_S.new_tensor(response_ids)])
        mask_S = torch.arange(len(ids_S)) >= len(prompt.ids_S)
        rendered = replace(prompt, ids_S=ids_S)
        return self._sample(conversation, rendered, self._roles(ids_S, mask_S), response_ids)

    def _roles(self, ids_S: torch.Tensor, response_S: torch.Tensor | None = None) -> torch.Tensor:
        mask_1S = None if response_S is None else response_S[None]
        return self.checkpoint.role_map(ids_S[None], torch.ones_like(ids_S)[None], mask_1S)[0]

    def _sample(self, conversation, rendered, roles_S, response_ids) -> LabelledSample:
        total = int((roles_S == TokenRole.IMAGE).sum())
        tokens_I = tokens_by_image(self.checkpoint, conversation, rendered, total)
        return LabelledSample(rendered, roles_S, tuple(tokens_I), response_ids)

    # ---- measuring ---------------------------------------------------------------------------------------------

    def score(
        self, samples: Sequence[LabelledSample], partners: Sequence[Mapping[str, torch.Tensor] | None] | None = None
    ) -> list[dict[str, Any]]:
        """Record content (`_parts`) of every sample, from one forward pass over those that can be measured, and one
        over those that have a dependency.

        Args:
            partners: for corruption=swap, the features of the images that each sample gets instead of its own.

        Raises:
            ValueError: a sample that has a dependency but no partner, or one with images of other shapes.
        """
        wanted = torch.tensor([int(QUERIES[name]) for name in self.queries])
        masses = [
            index
            for index, sample in enumerate(samples)
            if sample.skipped is None and bool(torch.isin(sample.roles_S, wanted).any())
        ]
        depends = [index for index, sample in enumerate(samples) if self.corruption and not sample.without_dependency]
        # Before the first pass: a sample that is refused costs none.
        corrupted = {
            index: self._corrupted(samples[index], None if partners is None else partners[index]) for index in depends
        }
        chosen = sorted({*masses, *depends})
        sums: dict[int, torch.Tensor] = {}
        dependency: dict[int, torch.Tensor] = {}
        if chosen:
            sums_B, log_probs_B = self._pass([samples[index] for index in chosen], bool(masses), bool(depends))
            sums = dict(zip(chosen, sums_B, strict=True)) if masses else {}
            log_probs = dict(zip(chosen, log_probs_B, strict=True)) if depends else {}
            if depends:
                _, corrupted_B = self._pass(list(corrupted.values()), False, True)
                pairs = zip(depends, corrupted_B, strict=True)
                dependency = {index: token_dependency(log_probs[index], other_T) for index, other_T in pairs}
        return [self._parts(sample, sums.get(index), dependency.get(index)) for index, sample in enumerate(samples)]

    def _corrupted(self, sample: LabelledSample, partner: Mapping[str, torch.Tensor] | None) -> LabelledSample:
        """The same tokens with other images."""
        own = sample.rendered.features
        if self.corruption == "blank":
            features = corrupt.blank(own)
        elif partner is None:
            raise ValueError(
                "corruption=swap needs the images of another sample; got none. Give a partner, or use corruption=blank."
            )
        else:
            features = corrupt.swap(own, partner)
        return replace(sample, rendered=replace(sample.rendered, features=features))

    @torch.no_grad()
    def _pass(
        self, samples: Sequence[LabelledSample], masses: bool, likelihood: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """One forward pass. For every sample, with `masses` what `_capture` gives, and with `likelihood`
        log p(y_t | everything before y_t), (T,) float32 in nats, of its response tokens."""
        checkpoint = self.checkpoint
        inputs = checkpoint.collate([sample.rendered for sample in samples], self.padding_side)
        with self._capture(samples) if masses else contextlib.nullcontext() as captured:
            logits_BSV = checkpoint.model(**inputs, use_cache=False).logits
        sums_B = list(torch.stack(captured.per_layer(), dim=1).cpu()) if masses else []
        if not likelihood:
            return sums_B, []
        roles_BS, log_probs_B = self._padded([sample.roles_S for sample in samples]), []
        for row, roles_S in enumerate(roles_BS):
            positions_T = (roles_S == TokenRole.RESPONSE).nonzero()[:, 0].to(logits_BSV.device)
            ids_T1 = inputs["input_ids"][row, positions_T, None]
            logits_TV = logits_BSV[row, positions_T - 1].float()  # A response is never first.
            log_probs_B.append(logits_TV.log_softmax(-1).gather(1, ids_T1)[:, 0].cpu())
        return sums_B, log_probs_B

    def _padded(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, S), padded like the ids of `Checkpoint.collate`; 0 is OTHER, which has no group."""
        sides = {"padding_side": self.padding_side, "batch_first": True, "padding_value": 0}
        return torch.nn.utils.rnn.pad_sequence(list(rows), **sides)

    def _capture(self, samples: Sequence[LabelledSample]):
        """Capture of (B, H, G, K) float64 sums over queries by layer; K: SUMS, then mass and ratio of every image."""
        checkpoint = self.checkpoint
        device = checkpoint.model.device
        roles_BS = self._padded([sample.roles_S for sample in samples]).to(device)
        num_images = max(len(sample.tokens_I) for sample in samples)
        image_groups = range(NUM_ROLES, NUM_ROLES + num_images)
        groups_BS = self._padded([_key_groups(sample) for sample in samples]).to(device)
        wanted = [QUERIES[name] for name in self.queries]
        positions_BQ, valid_BQ = select_queries(roles_BS, wanted)
        groups_BQ = torch.where(valid_BQ, _query_groups(roles_BS).gather(1, positions_BQ), len(BIN_STARTS) + 1)

        def reduction(mass_BHQC: torch.Tensor, _valid_BQ: torch.Tensor) -> torch.Tensor:
            mass_BHQC = mass_BHQC.double()
            images_BHQI, system_BHQ = mass_BHQC[..., NUM_ROLES:], mass_BHQC[..., TokenRole.SYSTEM]
            image_BHQ = images_BHQI.sum(-1)
            parts = [image_BHQ / system_BHQ, image_BHQ / (image_BHQ + system_BHQ), image_BHQ, system_BHQ]
            stats_BHQK = torch.stack(parts, dim=-1)
            stats_BHQK = torch.cat([stats_BHQK, images_BHQI, images_BHQI / system_BHQ[..., None]], dim=-1)
            B, H, Q, K = stats_BHQK.shape
            # An extra group takes the padding, whose ratios are 0 / 0.
            out_BHGK = stats_BHQK.new_zeros(B, H, len(BIN_STARTS) + 2, K)
            index = groups_BQ[:, None, :, None].expand(-1, H, -1, K)
            return out_BHGK.scatter_add_(2, index, stats_BHQK)[:, :, :-1]

        return capture_mass(
            checkpoint.model,
            roles_BS,
            layers=self.layers,
            query_role=wanted,
            reduction=reduction,
            key_groups=groups_BS,
            num_groups=NUM_ROLES + num_images,
            columns=(TokenRole.SYSTEM, *image_groups),
        )

    def _parts(
        self, sample: LabelledSample, sums_LHGK: torch.Tensor | None, dependency_T: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """`images` (tokens of each), `skipped` (reason by query, or by `dependency`), by query the sums
        (`_query_part`), and `dependency`, that of every response token in nats."""
        roles_S = sample.roles_S
        out: dict[str, Any] = {"images": list(sample.tokens_I), "skipped": {}}
        for name in self.queries:
            is_query_S = roles_S == QUERIES[name]
            reason = sample.skipped or (None if bool(is_query_S.any()) else NO_QUERY[name])
            if reason is not None:
                out["skipped"][name] = reason
                continue
            groups_S = _query_groups(roles_S[None])[0][is_query_S]
            first_image = int((roles_S == TokenRole.IMAGE).nonzero()[0])
            blind = int(is_query_S[:first_image].sum())
            counts_G = torch.bincount(groups_S, minlength=len(BIN_STARTS) + 1)
            out[name] = _query_part(name, sums_LHGK, counts_G, blind, len(sample.tokens_I))
        if dependency_T is not None:
            out[DEPENDENCY] = dependency_T.tolist()
        elif self.corruption is not None:
            out["skipped"][DEPENDENCY] = sample.without_dependency
        return out


def _without_earlier_turns(roles_S: torch.Tensor, answered: bool) -> torch.Tensor:
    """Roles in which only the last assistant turn is RESPONSE, as in a rollout; none without an answer."""
    is_response_S = roles_S == TokenRole.RESPONSE
    earlier_S = is_response_S
    if answered and bool(is_response_S.any()):
        last = int(is_response_S.nonzero()[-1])
        start = int((~is_response_S[:last]).nonzero()[-1])
        earlier_S = is_response_S & (torch.arange(len(roles_S)) < start)
    return roles_S.masked_fill(earlier_S, TokenRole.OTHER)


def _key_groups(sample: LabelledSample) -> torch.Tensor:
    """(S,) role of every key, and for image tokens NUM_ROLES plus the number of the image."""
    groups_S = sample.roles_S.clone()
    numbers = [NUM_ROLES + image for image, tokens in enumerate(sample.tokens_I) for _ in range(tokens)]
    groups_S[sample.roles_S == TokenRole.IMAGE] = torch.tensor(numbers)
    return groups_S


def _query_groups(roles_BS: torch.Tensor) -> torch.Tensor:
    """(B, S) group of a query: 0 for user, 1 plus its bin for response; meaningless for others."""
    position_BS = ((roles_BS == TokenRole.RESPONSE).long().cumsum(1) - 1).clamp(min=0)
    bins_BS = torch.bucketize(position_BS, torch.tensor(BIN_STARTS, device=roles_BS.device), right=True)
    return bins_BS.masked_fill(roles_BS == TokenRole.USER, 0)


def _query_part(name: str, sums_LHGK: torch.Tensor, counts_G: torch.Tensor, blind: int, num_images: int) -> dict:
    """Content of a record for a query role.

    `queries`: their number; `before_image`: number of queries that see no image, whose ratio is 0; SUMS: sums over
    queries by layer and head; `image_mass`, `image_ratio`: sums over queries per image, mean over layers and heads;
    `positions` (response): for each bin up to the last one reached, `queries` and SUMS by layer, mean over heads.
    """
    groups = slice(0, 1) if name == "user" else slice(1, None)
    sums_LHGK, counts_G = sums_LHGK[:, :, groups], counts_G[groups]
    total_LHK = sums_LHGK.sum(2)
    means_K = total_LHK.mean((0, 1))
    most = (total_LHK.shape[-1] - len(SUMS)) // 2  # Largest number of images in the batch; this sample may have fewer.
    start = len(SUMS)
    out = {
        "queries": int(counts_G.sum()),
        "before_image": blind,
        **{key: total_LHK[..., index].tolist() for index, key in enumerate(SUMS)},
        "image_mass": means_K[start : start + num_images].tolist(),
        "image_ratio": means_K[start + most : start + most + num_images].tolist(),
    }
    if name == "response":
        last = int(counts_G.nonzero()[-1]) + 1
        by_bin_GLK = sums_LHGK[:, :, :last].mean(1).movedim(1, 0)
        out["positions"] = {
            "queries": counts_G[:last].tolist(),
            **{key: by_bin_GLK[..., index].tolist() for index, key in enumerate(SUMS)},
        }
    return out
