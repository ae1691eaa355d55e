# SPDX-License-Identifier: Apache-2.0
"""The Visual Attention Score (VAS) and its bounded companions, from attention masses.

VAS is a ratio whose denominator can approach zero in a head, so a few heads can dominate its mean. Its companions are
always reported with it: image share in [0, 1], ratio of mean masses, median over heads.

Shape suffixes: L = layers, H = query heads, R = token roles
"""

import math

import torch

from avar_verl.model.roles import TokenRole

# Bands of the paper for 7B models (arXiv 2603.03825): below 10 narrow, 10 to 15 wide, above 15 panoramic.
BANDS = ((10.0, "narrow"), (15.0, "wide"), (float("inf"), "panoramic"))
STATISTICS = ("vas", "vas_median", "ratio_of_means", "log_ratio", "image_share", "image_mass", "system_mass")


def band(vas: float) -> str | None:
    """The paper's band of a VAS; None if it is not finite."""
    return next(name for bound, name in BANDS if vas < bound) if math.isfinite(vas) else None


def image_share(mass: torch.Tensor) -> torch.Tensor:
    """m_image / (m_image + m_system), in [0, 1]; (..., R) -> (...). nan if both masses are 0."""
    image, system = mass[..., TokenRole.IMAGE], mass[..., TokenRole.SYSTEM]
    return image / (image + system)


def attention_ratio(mass: torch.Tensor) -> torch.Tensor:
    """m_image / m_system, in [0, inf]; (..., R) -> (...). inf if the system mass is 0, nan if both are."""
    return mass[..., TokenRole.IMAGE] / mass[..., TokenRole.SYSTEM]


def vas_statistics(
    ratio_LH: torch.Tensor, share_LH: torch.Tensor, image_LH: torch.Tensor, system_LH: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The `STATISTICS`, from means over queries by layer and head; (..., L, H) -> (...) each.

    `vas`, the paper's mean over layers, heads and queries of the ratio; `vas_median`, the median over layers and heads
    of the mean ratio; `ratio_of_means`, mean image mass over mean system mass; `log_ratio`, its natural logarithm;
    `image_share`; `image_mass`; `system_mass`. A ratio is inf if its denominator is 0, nan if both masses are.
    """
    image, system = image_LH.mean((-2, -1)), system_LH.mean((-2, -1))
    return {
        "vas": ratio_LH.mean((-2, -1)),
        "vas_median": ratio_LH.flatten(-2).quantile(0.5, dim=-1),
        "ratio_of_means": image / system,
        "log_ratio": (image / system).log(),
        "image_share": share_LH.mean((-2, -1)),
        "image_mass": image,
        "system_mass": system,
    }
