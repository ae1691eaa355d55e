# SPDX-License-Identifier: Apache-2.0
"""The Visual Attention Score (VAS) and its bounded companions, from attention masses.

VAS is a ratio whose denominator can approach zero in a head, so a few heads can dominate its mean. Its companions are
always reported with it: image share in [0, 1], ratio of mean masses, median over heads.

Shape suffixes: B = samples, L = layers, H = query heads, Q = queries, R = token roles
"""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class VasSums:
    """Sums over samples and queries that add up across batches and processes.

    `ratio_LH`, `share_LH`, `image_LH`, `system_LH`: float64 sums over all real queries, by layer and head.
    `num_queries`: how many. `num_samples`: samples that counted. `num_skipped`: samples left out because they lack an
    image, a system turn or a query, so that VAS is not defined.
    """

    ratio_LH: torch.Tensor
    share_LH: torch.Tensor
    image_LH: torch.Tensor
    system_LH: torch.Tensor
    num_queries: int
    num_samples: int
    num_skipped: int

    def __add__(self, other: "VasSums") -> "VasSums":
        return VasSums(
            *(
                getattr(self, name) + getattr(other, name)
                for name in (
                    "ratio_LH",
                    "share_LH",
                    "image_LH",
                    "system_LH",
                    "num_queries",
                    "num_samples",
                    "num_skipped",
                )
            )
        )

    def summary(self) -> dict[str, float]:
        """`vas_statistics` over all queries.

        Raises:
            ValueError: no sample counted.
        """
        if not self.num_queries:
            raise ValueError(
                f"VAS needs samples with an image, a system turn and a query; got none in {self.num_skipped} samples. "
                "Check the chat template and the query role."
            )
        sums = (self.ratio_LH, self.share_LH, self.image_LH, self.system_LH)
        return {name: float(value) for name, value in vas_statistics(*(x / self.num_queries for x in sums)).items()}


def vas_sums(mass_BLHQR: torch.Tensor, key_roles_BS: torch.Tensor, valid_BQ: torch.Tensor) -> VasSums:
    """Sums of the VAS statistics over one batch.

    Args:
        mass_BLHQR: attention masses of the selected queries.
        key_roles_BS: `TokenRole` of the keys, to find samples with an image and a system turn.
        valid_BQ: bool, False on padding.
    """
    has_image_B = (key_roles_BS == TokenRole.IMAGE).any(1)
    has_system_B = (key_roles_BS == TokenRole.SYSTEM).any(1)
    counts_B = has_image_B & has_system_B & valid_BQ.any(1)
    mass_NLHR = mass_BLHQR.movedim(3, 1)[valid_BQ & counts_B[:, None]].double()  # N real queries of counted samples
    return VasSums(
        ratio_LH=attention_ratio(mass_NLHR).sum(0),
        share_LH=image_share(mass_NLHR).sum(0),
        image_LH=mass_NLHR[..., TokenRole.IMAGE].sum(0),
        system_LH=mass_NLHR[..., TokenRole.SYSTEM].sum(0),
        num_queries=mass_NLHR.shape[0],
        num_samples=int(counts_B.sum()),
        num_skipped=int((~counts_B).sum()),
    )
