# SPDX-License-Identifier: Apache-2.0
"""Numbers from records by hand, and intervals against a plain bootstrap."""

import math

import numpy as np
import pytest
import torch

from avar_verl.objectives.vas import STATISTICS, attention_ratio, band, image_share, vas_statistics
from avar_verl.roles import TokenRole
from avar_verl.tools.stats import Bootstrap, interval, with_interval
from avar_verl.tools.vas.statistics import (
    MEAN_STATISTICS,
    by_image,
    by_position,
    by_sample,
    summarize_dependency,
    summarize_query,
    totals,
)

HEADS = {"ratio": [[6.0, 2.0]], "share": [[1.5, 1.0]], "image": [[0.8, 0.4]], "system": [[0.3, 0.4]]}


def part(scale: float = 1.0, queries: int = 2, before: int = 0, **changes) -> dict:
    """A query role of a record of one layer and two heads; sums grow with `scale`."""
    sums = {key: [[scale * value for value in row] for row in rows] for key, rows in HEADS.items()}
    image_mass = scale * 0.6
    extra = {"image_mass": [image_mass], "image_ratio": [scale * 4.0]}
    return {"queries": queries, "before_image": before, **sums, **extra, **changes}


def record(row: int, **parts) -> dict:
    return {"row": row, "sample": f"{row:x}", "images": [4], "skipped": {}, **parts}


def test_by_hand():
    """Head ratios 6 / 2 and 2 / 2: VAS 2, median 2; masses 1.2 / 4 and 0.7 / 4."""
    summary = summarize_query("user", [record(0, user=part(before=1))], [0], Bootstrap())
    overall = {key: value["value"] for key, value in summary["overall"].items()}
    assert overall["vas"] == overall["vas_median"] == pytest.approx(2.0)
    assert overall["image_share"] == pytest.approx(2.5 / 4)
    assert overall["image_mass"] == pytest.approx(0.3) and overall["system_mass"] == pytest.approx(0.175)
    assert overall["ratio_of_means"] == pytest.approx(0.3 / 0.175)
    assert overall["log_ratio"] == pytest.approx(math.log(0.3 / 0.175))
    assert summary["band"] == "narrow" and summary["num_queries"] == 2 and summary["num_queries_before_image"] == 1
    assert summary["layers"]["layer"] == [0] and summary["layers"]["vas"]["value"] == pytest.approx([2.0])
    assert summary["heads"]["vas"]["value"] == [pytest.approx([3.0, 1.0])]
    assert summary["heads"]["image_share"]["value"] == [pytest.approx([0.75, 0.5])]
    assert "positions" not in summary


def test_one_sample_has_no_interval():
    summary = summarize_query("user", [record(0, user=part())], [0], Bootstrap())
    assert summary["overall"]["vas"] == {"value": pytest.approx(2.0), "low": None, "high": None}
    assert summary["heads"]["vas"]["low"] is None


def test_queries_weigh_the_same_whatever_their_sample():
    """Two queries of VAS 2 and six of VAS 6: (2 * 2 + 6 * 6) / 8 = 5, not the mean of the samples, 4."""
    records = [record(0, user=part()), record(1, user=part(scale=9.0, queries=6))]
    summary = summarize_query("user", records, [0], Bootstrap())
    assert summary["overall"]["vas"]["value"] == pytest.approx(5.0) and summary["num_queries"] == 8


def test_dependency_by_hand():
    """Means 2 and -1 of two responses, whatever their length: 0.5. Tokens 0 to 3: (1 + 3 - 1) / 3; token 4 alone: 2."""
    records = [
        record(0, dependency=[1.0, 3.0]),
        record(1, dependency=[-1.0]),
        {**record(2), "skipped": {"dependency": "no image"}},
    ]
    summary = summarize_dependency(records, Bootstrap())
    assert (summary["num_samples"], summary["num_tokens"], summary["skipped"]) == (2, 3, {"no image": 1})
    assert summary["overall"]["value"] == pytest.approx(0.5)
    assert (summary["overall"]["low"], summary["overall"]["high"]) == (-1.0, 2.0)
    [first] = summary["positions"]
    assert (first["first"], first["last"], first["num_samples"], first["num_queries"]) == (0, 3, 2, 3)
    assert first["dependency"]["value"] == pytest.approx(1.0)
    assert by_sample(records, ())["dependency"] == {"queries": [2, 1, None], "dependency": [2.0, -1.0, None]}

    longer = summarize_dependency([record(0, dependency=[0.0] * 4 + [2.0]), *records], Bootstrap())
    assert [one["first"] for one in longer["positions"]] == [0, 4]
    assert longer["positions"][1]["dependency"] == {"value": 2.0, "low": None, "high": None}
    with pytest.raises(ValueError, match=r"got none in 1 samples \(no image: 1\)"):
        summarize_dependency(records[2:], Bootstrap())


def random_records(n: int, seed: int = 0) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
    """Records of n samples of 3 layers, 4 heads and up to 5 queries, with the masses they came from."""
    generator = torch.Generator().manual_seed(seed)
    mass_BLHQR = torch.rand(n, 3, 4, 5, len(TokenRole), generator=generator).double()
    valid_BQ = torch.rand(n, 5, generator=generator) > 0.3
    valid_BQ[:, 0] = True
    records = []
    for index in range(n):
        mass_LHQR = mass_BLHQR[index][:, :, valid_BQ[index]]
        image, system = mass_LHQR[..., TokenRole.IMAGE], mass_LHQR[..., TokenRole.SYSTEM]
        stats = {"ratio": image / system, "share": image / (image + system), "image": image, "system": system}
        sums = {key: value.sum(-1).tolist() for key, value in stats.items()}
        extra = {"image_mass": [1.0], "image_ratio": [1.0], "before_image": 0, "queries": int(valid_BQ[index].sum())}
        positions = {"queries": [extra["queries"]], **{k: [v.sum(-1).mean(1).tolist()] for k, v in stats.items()}}
        records.append(record(index, response={**sums, **extra, "positions": positions}))
    return records, mass_BLHQR, valid_BQ


def over_all_queries(mass_BLHQR: torch.Tensor, valid_BQ: torch.Tensor) -> dict[str, float]:
    """The definition: means over the queries of all samples at once."""
    mass_NLHR = mass_BLHQR.movedim(3, 1)[valid_BQ].double()
    image, system = mass_NLHR[..., TokenRole.IMAGE], mass_NLHR[..., TokenRole.SYSTEM]
    parts = (attention_ratio(mass_NLHR), image_share(mass_NLHR), image, system)
    return {name: float(value) for name, value in vas_statistics(*(part.mean(0) for part in parts)).items()}


def test_sums_of_samples_give_the_means_over_all_queries():
    records, mass_BLHQR, valid_BQ = random_records(6)
    expected = over_all_queries(mass_BLHQR, valid_BQ)
    summary = summarize_query("response", records, [0, 1, 2], Bootstrap())
    for key in STATISTICS:
        assert summary["overall"][key]["value"] == pytest.approx(expected[key], rel=1e-12), key
    # Every layer is what it is by itself.
    for layer in range(3):
        alone = over_all_queries(mass_BLHQR[:, layer : layer + 1], valid_BQ)
        for key in STATISTICS:
            assert summary["layers"][key]["value"][layer] == pytest.approx(alone[key], rel=1e-12), key
    # One bin holds all: it is the whole, but for the median.
    [only] = summary["positions"]
    for key in MEAN_STATISTICS:
        assert only[key]["value"] == pytest.approx(expected[key], rel=1e-12), key


def test_intervals_are_those_of_a_plain_bootstrap():
    """Draw by draw, with the records repeated as often as they were drawn."""
    records, _, _ = random_records(7)
    bootstrap = Bootstrap(num_draws=100, seed=3)
    summary = summarize_query("response", records, [0, 1, 2], bootstrap)
    counts_DN = torch.from_numpy(bootstrap.counts(7)).int()
    values = {key: [] for key in STATISTICS}
    for counts_N in counts_DN[1:]:
        drawn = [one for one, times in zip(records, counts_N.tolist(), strict=True) for _ in range(times)]
        overall = summarize_query("response", drawn, [0, 1, 2], Bootstrap(num_draws=100))["overall"]
        for key in STATISTICS:
            values[key].append(overall[key]["value"])
    for key in STATISTICS:
        ranked = sorted(values[key])
        assert summary["overall"][key]["low"] == pytest.approx(ranked[2], rel=1e-12), key  # The third of 100.
        assert summary["overall"][key]["high"] == pytest.approx(ranked[97], rel=1e-12), key
        assert summary["overall"][key]["low"] < summary["overall"][key]["value"] < summary["overall"][key]["high"]


def test_draws_are_seeded_and_whole():
    one, same, other = (torch.from_numpy(Bootstrap(200, seed).counts(5)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (201, 5) and bool((one.sum(1) == 5).all()) and one[0].tolist() == [1.0] * 5
    assert float(one[1:].var(dim=0, correction=0).mean()) == pytest.approx(0.8, rel=0.1)  # 5 * 1/5 * 4/5


def test_intervals_narrow_with_the_root_of_the_samples():
    """Samples that differ only by noise: the interval's width is that of a normal mean, 2 * 1.96 * s / sqrt(n)."""
    rng = np.random.default_rng(0)
    for n in (50, 400):
        scales = rng.normal(1.0, 0.2, n)
        records = [record(i, user=part(scale=float(s))) for i, s in enumerate(scales)]
        share = summarize_query("user", records, [0], Bootstrap(seed=n))["overall"]["vas"]
        expected = 2 * 1.96 * (2 * scales.std()) / math.sqrt(n)
        assert share["high"] - share["low"] == pytest.approx(expected, rel=0.15)


def test_what_is_not_finite_stays_in_its_draws():
    counts = torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0]]).double()
    values = torch.tensor([[1.0, 1.0], [math.inf, 2.0], [3.0, math.nan]]).double()
    total = totals(counts, values)
    assert total[:, 0].tolist() == [math.inf, 3.0, math.inf, 5.0]
    assert math.isnan(total[0, 1]) and total[1, 1] == 3.0 and math.isnan(total[2, 1]) and math.isnan(total[3, 1])


def test_an_infinite_ratio_is_said():
    """One head without system mass in one of two samples: VAS is inf, the median and the share stay."""
    sick = part(ratio=[["inf", 2.0]], system=[[0.0, 0.4]])
    summary = summarize_query("user", [record(0, user=part()), record(1, user=sick)], [0], Bootstrap())
    overall = summary["overall"]
    assert overall["vas"] == {"value": math.inf, "low": pytest.approx(2.0), "high": math.inf}
    assert summary["band"] is None and overall["image_share"]["high"] < 1
    assert summary["heads"]["vas"]["value"] == [[math.inf, pytest.approx(1.0)]]
    assert overall["ratio_of_means"]["value"] == pytest.approx(2.4 / 1.1)


@pytest.mark.parametrize("bad", [[math.nan] * 4, [1.0, 1.0, math.nan, 1.0]])
def test_a_draw_without_a_value_leaves_no_interval(bad):
    low, high = interval([1.0, *bad])
    assert math.isnan(low) and math.isnan(high)


def test_quantiles_are_values_that_were_drawn():
    """0.025 of 200: the fifth smallest; 0.975: the 195th."""
    part = with_interval(np.array([7.0, *range(200, 0, -1)]))
    assert part == {"value": 7.0, "low": 5.0, "high": 195.0}


def test_positions_have_the_samples_that_reach_them():
    """Sample 0 has six tokens (bins 0 to 3, 4 to 7), sample 1 three."""
    long = {"queries": [4, 2], "ratio": [[8.0], [2.0]], "share": [[2.0], [0.5]], "image": [[2.0], [0.4]],
            "system": [[1.0], [0.4]]}  # fmt: skip
    short = {"queries": [3], "ratio": [[6.0]], "share": [[1.5]], "image": [[1.5]], "system": [[0.75]]}
    first, second = by_position([long, short], Bootstrap())
    assert (first["first"], first["last"], second["first"], second["last"]) == (0, 3, 4, 7)
    assert (first["num_samples"], first["num_queries"]) == (2, 7)
    assert (second["num_samples"], second["num_queries"]) == (1, 2)
    assert first["vas"]["value"] == pytest.approx(2.0) and first["image_share"]["value"] == pytest.approx(0.5)
    assert second["vas"] == {"value": pytest.approx(1.0), "low": None, "high": None}
    assert second["image_share"]["value"] == pytest.approx(0.25) and second["image_share_by_layer"] == [0.25]
    assert "vas_median" not in first


def test_images_are_told_apart():
    """The second image is that of one sample: 0.2 of mass on 8 tokens over 2 queries."""
    two = part(image_mass=[0.4, 0.2], image_ratio=[3.0, 1.0])
    records = [record(0, user=two) | {"images": [4, 8]}, record(1, user=part())]
    first, second = by_image(records, "user", Bootstrap())
    assert (first["num_samples"], second["num_samples"]) == (2, 1)
    assert first["tokens"] == 4.0 and second["tokens"] == 8.0
    assert first["image_mass"]["value"] == pytest.approx((0.4 + 0.6) / 4) and second["vas"]["value"] == 0.5
    assert second["image_mass"]["value"] == pytest.approx(0.1)
    assert second["mass_per_token"]["value"] == pytest.approx(0.0125)


def test_skipped_samples_are_counted_by_reason():
    records = [record(0, user=part())]
    records += [{"row": n, "sample": "", "images": [], "skipped": {"user": reason}}
                for n, reason in enumerate(["no image", "no system turn", "no image"], start=1)]  # fmt: skip
    assert summarize_query("user", records, [0], Bootstrap())["skipped"] == {"no image": 2, "no system turn": 1}
    with pytest.raises(ValueError, match=r"got none for user queries in 3 samples \(no image: 2, no system turn: 1\)"):
        summarize_query("user", records[1:], [0], Bootstrap())


def test_columns_by_sample():
    skipped = {"row": 4, "sample": "s", "images": [], "skipped": {"user": "no image"}}
    columns = by_sample([record(3, user=part()), skipped], ["user"])
    assert columns["row"] == [3, 4] and columns["sample"] == ["3", "s"]
    assert columns["user"]["queries"] == [2, None] and columns["user"]["ratio"] == [4.0, None]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 100 draws; got 99"):
        Bootstrap(num_draws=99)


@pytest.mark.parametrize(
    "vas, name", [(0.0, "narrow"), (9.99, "narrow"), (10.0, "wide"), (15.0, "panoramic"), (math.inf, None)]
)
def test_bands(vas, name):
    assert band(vas) == name and band(math.nan) is None
