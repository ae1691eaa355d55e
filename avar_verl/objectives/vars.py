# SPDX-License-Identifier: Apache-2.0
"""VARS: the visual attention reward of one rollout.

    r_visual = mean_{t in T} mean_{l in L} m_image(l, t) / (m_system(l, t) + epsilon)     if the answer is right, else 0

T are the response tokens, m(l, t) the mean over heads (arXiv 2603.03825, the VARS reward). The ratio is unbounded, and
a policy can raise it by shrinking the denominator, so there are also a bounded statistic, one that measures use instead
of attention (`objectives.dependency`), and several shapings.

Shape suffixes: B = samples, H = query heads, Q = queries, R = token roles, X = R and more, F = fields of VISUAL_FIELDS
"""

from collections.abc import Callable, Sequence

import torch

from avar_verl.model.roles import TokenRole
from avar_verl.objectives.agto import normalized_weights
from avar_verl.objectives.groups import group_index, group_rank
from avar_verl.objectives.vas import attention_ratio

# What `visual_fields` returns for every sample.
MASS_FIELDS = (
    *("ratio", "image_share", "image_mass", "system_mass", "vas"),
    *("num_queries", "num_image", "num_system"),
)
# What the log-prob pass returns for every sample, a vector of F numbers; nan where something is not measured.
VISUAL_FIELDS = (*MASS_FIELDS, "dependency")
# Undefined for a sample without a system turn.
_OF_SYSTEM = [MASS_FIELDS.index(name) for name in ("ratio", "image_share", "vas")]
# The masses that the reduction reads.
VISUAL_ROLES = (TokenRole.SYSTEM, TokenRole.IMAGE)
STATISTICS = ("ratio", "image_share", "dependency")
SHAPINGS = ("none", "clip", "log", "rank")


class VisualReduction:
    """Reduction of one layer for `capture_mass`: the first five of MASS_FIELDS, means over the sample's queries.

    (B, H, Q, R) -> (B, 5); nan for a sample without queries. `ratio` and `image_share` use masses averaged over the
    heads, as in r_visual. `vas` is the paper's metric, the mean over heads of m_image / m_system without an epsilon:
    inf if a head gives the system turn no mass at all.
    """

    def __init__(self, epsilon: float, head_mean: Callable[[torch.Tensor], torch.Tensor] | None = None):
        """`head_mean(x_BHQX) -> x_BQX`, needed if the heads are spread over several processes."""
        self.epsilon = epsilon
        self.head_mean = head_mean or (lambda x_BHQX: x_BHQX.mean(1))

    def __call__(self, mass_BHQR: torch.Tensor, valid_BQ: torch.Tensor) -> torch.Tensor:
        mean_BQX = self.head_mean(torch.cat([mass_BHQR, attention_ratio(mass_BHQR)[..., None]], dim=-1))
        image, system, vas = mean_BQX[..., TokenRole.IMAGE], mean_BQX[..., TokenRole.SYSTEM], mean_BQX[..., -1]
        fields_BQF = torch.stack(
            [image / (system + self.epsilon), image / (image + system), image, system, vas], dim=-1
        )
        fields_BQF = fields_BQF.where(valid_BQ[..., None], 0.0)
        return fields_BQF.sum(1) / valid_BQ.sum(1)[:, None]


def visual_fields(
    per_layer: list[torch.Tensor],
    roles_BS: torch.Tensor,
    valid_BQ: torch.Tensor,
    layer_weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """(B, 8) float32 in the order of MASS_FIELDS, from the `VisualReduction` of every captured layer.

    Layers are averaged, by `layer_weights` if given.

    `ratio`, `image_share` and `vas` of a sample without a system turn are nan: epsilon must not make up a number.
    """
    counts = [
        valid_BQ.sum(1),
        (roles_BS == TokenRole.IMAGE).sum(1),
        (roles_BS == TokenRole.SYSTEM).sum(1),
    ]
    fields_LB5 = torch.stack(per_layer)
    if layer_weights is None:
        means_B5 = fields_LB5.mean(0)
    else:
        means_B5 = torch.einsum("l,lbf->bf", normalized_weights(layer_weights, fields_LB5), fields_LB5)
    undefined_B = counts[2] == 0
    # Column by column: indexing with a list of columns would copy it to the device and wait.
    columns = [
        means_B5[:, i].masked_fill(undefined_B, float("nan")) if i in _OF_SYSTEM else means_B5[:, i]
        for i in range(means_B5.shape[1])
    ]
    return torch.stack([*columns, *(count.float() for count in counts)], dim=1)


def shape_visual_reward(
    raw_B: torch.Tensor,
    correct_B: torch.Tensor,
    groups: list,
    shaping: str = "none",
    clip_max: float | None = None,
) -> torch.Tensor:
    """r_visual of every rollout: gated on a correct answer, then shaped. (B,) float32, 0 for a wrong answer.

    Args:
        raw_B: the statistic; >= 0, but for the dependency, which is negative where the image makes a response less
            likely. Then r_visual is negative too, except with `rank`.
        correct_B: bool, the gate.
        groups: B hashable group ids (the prompt's uid), for `rank`.
        shaping: `none` raw; `clip` min(raw, clip_max); `log` log(1 + raw), for a statistic >= 0; `rank` the rank among
            the correct answers of the group divided by their number, in (0, 1]; ties share the mean rank.
        clip_max: bound of `clip`, > 0.

    Raises:
        ValueError: a correct answer whose statistic is not finite, or negative with `log`; an unknown shaping.

    >>> shape_visual_reward(torch.tensor([2.0, 8.0, 5.0]), torch.tensor([True, True, False]), ["a"] * 3, "clip", 4.0)
    tensor([2., 4., 0.])
    >>> shape_visual_reward(torch.tensor([2.0, 8.0, 5.0]), torch.tensor([True, True, False]), ["a"] * 3, "rank")
    tensor([0.5000, 1.0000, 0.0000])
    """
    undefined = correct_B & ~torch.isfinite(raw_B)
    if bool(undefined.any()):
        raise ValueError(
            "r_visual needs a response token, a system turn and a finite ratio for every right answer (the dependency "
            f"only a response token); got {raw_B[undefined].tolist()} at rows "
            f"{undefined.nonzero().flatten().tolist()}. Give the prompts a system turn, or set avar.vars.lambda_v=0."
        )
    raw_B = raw_B.where(correct_B, 0.0).float()
    if shaping == "none":
        return raw_B
    if shaping == "clip":
        return raw_B.clamp(max=clip_max)
    if shaping == "log":
        if bool((raw_B < 0).any()):
            raise ValueError(
                f"shaping=log needs a statistic >= 0; got {raw_B[raw_B < 0].tolist()}. Set avar.vars.shaping to none, "
                "clip or rank."
            )
        return torch.log1p(raw_B)
    if shaping == "rank":
        rank_B = torch.zeros_like(raw_B)
        rank_B[correct_B] = group_rank(raw_B[correct_B], group_index(groups)[correct_B])
        return rank_B
    raise ValueError(f"shaping must be one of {SHAPINGS}; got {shaping!r}. Set avar.vars.shaping.")
