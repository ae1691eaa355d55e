# SPDX-License-Identifier: Apache-2.0
"""AGTO: the attention-guided losses of the cold start.

    L_total    = L_LM + alpha * L_enhance + beta * L_suppress
    L_enhance  = - mean_l mean_h log( mean_q mass_image(l, h, q) / |K_image| )
    L_suppress = + mean_l mean_h log( mean_q mass_system(l, h, q) / |K_system| + epsilon )

per sample, then averaged over the samples of the global batch (arXiv 2603.03825, the AGTO objective).

Shape suffixes: B = samples, L = layers, H = query heads, Q = queries, R = token roles
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avar_verl.model.roles import TokenRole

# Columns that `mean_over_queries` adds after the R role masses.
RATIO, SHARE = len(TokenRole), len(TokenRole) + 1


def mean_over_queries(mass_BHQR: torch.Tensor, valid_BQ: torch.Tensor) -> torch.Tensor:
    """Mean over the real queries of a layer: (B, H, R + 2), 0 for a sample without queries.

    The last two columns are the mean of m_image / m_system and of m_image / (m_image + m_system), for the log, without
    gradients.
    """
    with torch.no_grad():
        image, system = mass_BHQR[..., TokenRole.IMAGE], mass_BHQR[..., TokenRole.SYSTEM]
        seen_BHQ = (image + system > 0) & valid_BQ[:, None]
        extra = torch.stack([image / system, image / (image + system)], dim=-1).where(seen_BHQ[..., None], 0.0)
    total_BHR = torch.cat([mass_BHQR, extra], dim=-1).sum(2)
    return total_BHR / valid_BQ.sum(1).clamp(min=1)[:, None, None]


@dataclass(frozen=True)
class AgtoTerms:
    """Per-sample guidance terms, and which samples have them; a sample without a term has 0 there.

    `enhance_B`, `suppress_B`: float32. `has_enhance_B`: the sample has an image and a query. `has_suppress_B`: also a
        system turn.
    """

    enhance_B: torch.Tensor
    suppress_B: torch.Tensor
    has_enhance_B: torch.Tensor
    has_suppress_B: torch.Tensor


def eligible(
    roles_BS: torch.Tensor, valid_BQ: torch.Tensor, has_image_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples have an enhance term (image and query) and a suppress term (also a system turn), bool (B,) each.

    `has_image_B`: which samples have an image without keys in these layers (cross-attention); they have no enhance
    term.
    """
    has_query_B, has_keys_B = valid_BQ.any(1), (roles_BS == TokenRole.IMAGE).any(1)
    has_image_B = has_keys_B if has_image_B is None else has_image_B
    return has_keys_B & has_query_B, has_image_B & has_query_B & (roles_BS == TokenRole.SYSTEM).any(1)


def normalized_weights(layer_weights: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """(L,) weights that sum to 1, on the device and in the type of `like`."""
    weights_L = torch.tensor(layer_weights, device=like.device, dtype=like.dtype)
    return weights_L / weights_L.sum()


def agto_terms(
    mean_mass_BLHR: torch.Tensor,
    roles_BS: torch.Tensor,
    valid_BQ: torch.Tensor,
    epsilon: float = 1e-6,
    image_target: float | None = None,
    system_floor: float | None = None,
    layer_weights: Sequence[float] | None = None,
    has_image_B: torch.Tensor | None = None,
) -> AgtoTerms:
    """L_enhance and L_suppress of every sample, in nats.

    Args:
        mean_mass_BLHR: masses averaged over each sample's queries (`mean_over_queries`; further columns are ignored).
        roles_BS: roles of the keys, for |K_image| and |K_system|.
        valid_BQ: which queries are real.
        epsilon: the paper's, inside the logarithm of L_suppress. >= 0.
        image_target: mass in (0, 1] at which a head is no longer pushed towards the image; None never stops.
        system_floor: mass in [0, 1) below which a head is no longer pushed away from the system turn; None never stops.
        layer_weights: L positive weights of mean_l, normalised by their sum; None is the plain mean.
        has_image_B: see `eligible`.

    Differentiable in the masses. A mass of exactly 0 counts as the smallest positive float and has no gradient.
    """
    has_enhance_B, has_suppress_B = eligible(roles_BS, valid_BQ, has_image_B)
    num_image_B = (roles_BS == TokenRole.IMAGE).sum(1).clamp(min=1)[:, None, None]
    num_system_B = (roles_BS == TokenRole.SYSTEM).sum(1).clamp(min=1)[:, None, None]

    image_BLH = mean_mass_BLHR[..., TokenRole.IMAGE].clamp(min=torch.finfo(torch.float32).tiny, max=image_target)
    system_BLH = mean_mass_BLHR[..., TokenRole.SYSTEM]
    if system_floor is not None:
        system_BLH = system_BLH.clamp(min=system_floor)
    argument_BLH = (system_BLH / num_system_B + epsilon).clamp(min=torch.finfo(torch.float32).tiny)

    def mean(x_BLH: torch.Tensor) -> torch.Tensor:
        if layer_weights is None:
            return x_BLH.mean((1, 2))
        return x_BLH.mean(2) @ normalized_weights(layer_weights, x_BLH)

    zero = mean_mass_BLHR.new_zeros(())
    return AgtoTerms(
        enhance_B=torch.where(has_enhance_B, mean(-torch.log(image_BLH / num_image_B)), zero),
        suppress_B=torch.where(has_suppress_B, mean(torch.log(argument_BLH)), zero),
        has_enhance_B=has_enhance_B,
        has_suppress_B=has_suppress_B,
    )


def schedule(step: int, warmup_steps: int = 0, anneal: tuple[int, int] | None = None) -> float:
    """Factor of alpha and beta at an optimizer step (from 0): rises linearly in the warm-up, falls in the annealing.

    1 from step `warmup_steps` on; with `anneal = (first, last)` it falls linearly from 1 at `first` to 0 at `last`.

    >>> [schedule(step, warmup_steps=4) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    >>> [schedule(step, anneal=(10, 20)) for step in (9, 15, 20)]
    [1.0, 0.5, 0.0]
    """
    factor = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if anneal is not None:
        first, last = anneal
        factor *= min(1.0, max(0.0, (last - step) / (last - first)))
    return factor
