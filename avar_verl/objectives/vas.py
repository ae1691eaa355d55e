# SPDX-License-Identifier: Apache-2.0
"""The Visual Attention Score (VAS) and its bounded companions, from attention masses.

VAS is a ratio whose denominator a head can drive to zero, so a mean of it is a statement about a few heads. The
companions are reported beside it everywhere: image share in [0, 1], ratio of mean masses, median over heads.

Shape suffixes: B = samples, L = layers, H = query heads, Q = queries, R = token roles
"""

from dataclasses import dataclass

import torch

from avar_verl.roles import TokenRole

# Bands of the paper for 7B models (arXiv 2603.03825): below 10 narrow, 10 to 15 wide, above 15 panoramic.
BANDS = ((10.0, "narrow"), (15.0, "wide"), (float("inf"), "panoramic"))


def image_share(mass: torch.Tensor) -> torch.Tensor:
    """m_image / (m_image + m_system), in [0, 1]; (..., R) -> (...). nan where both masses are 0."""
    image, system = mass[..., TokenRole.IMAGE], mass[..., TokenRole.SYSTEM]
    return image / (image + system)


def attention_ratio(mass: torch.Tensor) -> torch.Tensor:
    """m_image / m_system, in [0, inf]; (..., R) -> (...). inf where the system mass is 0, nan where both are."""
    return mass[..., TokenRole.IMAGE] / mass[..., TokenRole.SYSTEM]


@dataclass(frozen=True)
class VasSums:
    """Sums over samples and queries that add up across batches and processes.

    `ratio_LH`, `share_LH`, `image_LH`, `system_LH`: float64 sums over all real queries, by layer and head.
    `num_queries`: how many. `num_samples`: samples that counted. `num_skipped`: samples left out, because they lack
    an image, a system turn or a query, for which VAS is not defined.
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
        """`vas` (the paper's mean over layers, heads and queries of the ratio), `vas_median` (median over layers and
        heads of the mean ratio), `ratio_of_means`, `log_ratio` (natural log of it), `image_share`, `image_mass`,
        `system_mass`.

        Raises:
            ValueError: no sample counted.
        """
        if not self.num_queries:
            raise ValueError(
                f"VAS needs samples with an image, a system turn and a query; got none in {self.num_skipped} samples. "
                "Check the chat template and the query role."
            )
        ratio_LH = self.ratio_LH / self.num_queries
        image, system = float(self.image_LH.mean()) / self.num_queries, float(self.system_LH.mean()) / self.num_queries
        # A tensor divides by 0 as `attention_ratio` does: inf, or nan where both are 0.
        ratio_of_means = float(torch.tensor(image, dtype=torch.float64) / system)
        return {
            "vas": float(ratio_LH.mean()),
            "vas_median": float(ratio_LH.flatten().quantile(0.5)),
            "ratio_of_means": ratio_of_means,
            "log_ratio": float(torch.tensor(ratio_of_means, dtype=torch.float64).log()),
            "image_share": float(self.share_LH.mean()) / self.num_queries,
            "image_mass": image,
            "system_mass": system,
        }


def vas_sums(mass_BLHQR: torch.Tensor, key_roles_BS: torch.Tensor, valid_BQ: torch.Tensor) -> VasSums:
    """Sums of the VAS statistics over one batch.

    Args:
        mass_BLHQR: attention masses of the selected queries.
        key_roles_BS: `TokenRole` of the keys, to tell which samples have an image and a system turn.
        valid_BQ: bool, False on filling.
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
