"""Was joining worth it, by halves: a site's own photos, and the others', from numbers worked out by hand; and how the
page shows it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from app.errors import BouquetError
from bouquet.report import charts, comparison, reading, worth
from bouquet.report.comparison import Measured
from bouquet.report.page import page
from tests.kit.runs import history, measured, written

FERN = measured([0.6] * 3, [0.38, 0.40, 0.42], base=(0.9,), others={"rose": [0.5] * 3})


def sites(federated: tuple[float, ...] = (0.1996, 0.2002, 0.2001), **loss: Any) -> dict[str, Measured]:
    """Rose's 20 photos, lily's 60, fern's 20. On its own rose gains 0.2 %, −0.1 %, −0.05 %: mean 0.017 %, sd 0.161 %,
    half 4.303 · 0.161 / √3 = 0.40 %. On the others' photos, as one pile, it has (60 · 0.3 + 20 · 0.5) / 80 = 0.35
    alone, and (60 · 0.27 + 20 · 0.38) / 80 = 0.2975 federated, then 0.3025 and 0.3075: gains 15 %, 13.57 %, 12.14 %:
    mean 13.57 %, sd 1.43 %, half 3.55 %. (A mean of the two sites' would be 16.25 %.)
    """
    rose = comparison.Measured(20, {"base": (0.9,), "alone": (0.2,) * 3, "federated": federated} | loss)
    lily = comparison.Measured(
        60, {"base": (0.9,), "alone": (0.3,) * 3, "federated": (0.27,) * 3}, others={"rose": (0.3,) * 3}
    )
    return {"rose": rose, "lily": lily, "fern": FERN}


TIE = (
    "on its own 20 held-out photos the federated adapter's loss is 0.0 % lower than with training alone (95 % interval"
    " 0.4 % higher to 0.4 % lower, 3 seeds), a tie"
)
FAR = "on the others' 80 it is 13.6 % lower than with training alone (95 % interval 10.0 % to 17.1 % lower, 3 seeds)"


def test_where_its_own_photos_tie_and_the_others_pay_the_sentence_says_both():
    found = worth.verdict("rose", sites())
    assert found.answer == "yes"
    assert found.sentence == f"Yes, by the others' half: {TIE}, and {FAR}."
    own, others = found.halves
    assert (own.photos, own.gain, own.band) == (20, pytest.approx(0.0005 / 3), pytest.approx(0.003993, abs=1e-6))
    assert (others.photos, others.gain, others.band) == (
        80,
        pytest.approx(0.135714, abs=1e-6),
        pytest.approx(0.035491, abs=1e-6),
    )


def test_pooling_is_said_to_lose_its_own_half_where_it_would():
    """Pooled loses 3.0, 3.2 and 2.8 % on rose's own photos: half 4.303 · 0.2 / √3 = 0.50 %."""
    pooled = (0.206, 0.2064, 0.2056)
    lost = ": 3.0 % higher than with training alone (95 % interval 2.5 % to 3.5 % higher, 3 seeds)."
    told = worth.verdict("rose", sites(pooled=pooled)).sentence
    assert told == f"Yes, by the others' half: {TIE}, and {FAR}. Pooling all photos would lose on its own{lost}"
    both = worth.verdict("rose", sites((0.204, 0.2042, 0.2038), pooled=pooled))
    assert both.answer == "partly" and both.sentence.startswith("Partly, by the others' half: ")
    assert both.sentence.endswith(f" Pooling all photos would lose on its own as well{lost}")
    assert "Pooling" not in worth.verdict("rose", sites(pooled=(0.19, 0.19, 0.19))).sentence


def test_a_personal_adapter_has_a_row_and_a_sentence_of_its_own():
    """Gains 1.0, 1.1, 1.2 %: half 0.25 %."""
    found = worth.verdict("rose", sites(personal=(0.198, 0.1978, 0.1976)))
    assert [(half.who, half.where, half.answer) for half in found.halves] == [
        ("federated", "own", "tie"), ("federated", "others", "yes"), ("personal", "own", "yes"),
    ]  # fmt: skip
    assert found.sentence.endswith(
        " Trained on at home, on its own photos it is 1.1 % lower than with training alone (95 % interval 0.9 % to"
        " 1.3 % lower, 3 seeds)."
    )
    assert [row["name"] for row in worth.table(sites(personal=(0.19,) * 3)["rose"])] == [
        "base", "alone", "federated", "personal",
    ]  # fmt: skip


def test_the_others_photos_are_those_of_whom_has_evaluated_this_sites_own_adapter():
    told = sites()
    assert len(worth.verdict("lily", told).halves) == 1  # nobody has lily's
    half = worth.verdict("rose", {"rose": told["rose"], "fern": told["fern"]}).halves[1]
    assert (half.photos, half.gain) == (20, pytest.approx(0.2))


def test_one_seed_cannot_tell_a_tie_from_a_gain_on_either_half():
    rose = comparison.Measured(20, {"alone": (0.2,), "federated": (0.2,)})
    lily = comparison.Measured(20, {"alone": (0.3,), "federated": (0.1,)}, others={"rose": (0.4,)})
    found = worth.verdict("rose", {"rose": rose, "lily": lily})
    assert found.answer == "cannot tell" and found.sentence.startswith("Cannot tell from one seed: ")
    assert all(half.band is None for half in found.halves)


@pytest.mark.parametrize(
    ("mean", "half", "answer"),
    [
        (0.003, 0.006, "tie"),  # ends at 0.9 %
        (-0.003, 0.006, "tie"),
        (0.004, 0.006, "not shown"),  # at 1.0 %: no more than 1 % is known
        (0.003, 0.002, "yes"),
        (-0.003, 0.002, "no"),
        (0.0, 0.0, "tie"),
    ],
)
def test_a_tie_is_an_interval_around_none_that_ends_below_one_per_cent(mean, half, answer):
    assert worth.answer(mean, half) == answer


def test_what_rounding_may_hide_is_in_the_interval():
    """0.100 may be 0.0995 or 0.1005, and 0.101 may be 0.1005 or 0.1015: 1 % higher, and off by
    (0.0005 + 0.0005 · 1.01) / 0.1 = 1.005 %. Of three seeds that are alike the seeds alone would say that it is sure.
    """
    loss = {"alone": (0.1,) * 3, "federated": (0.101,) * 3}
    as_it_is, rounded = (
        worth.verdict("rose", {"rose": comparison.Measured(20, loss, digits=digits)}) for digits in (None, 3)
    )
    assert as_it_is.answer == "no" and as_it_is.halves[0].band == pytest.approx(0, abs=1e-9)
    assert rounded.answer == "not shown" and rounded.halves[0].band == pytest.approx(0.01005)


def test_in_the_pile_of_others_each_sites_rounding_counts_by_its_photos():
    """Lily's 60 are rounded: alone by 0.0005 of 0.3, federated as much, and fern's 20 are not: of the pile three
    quarters of that. 0.35 alone, and 0.2975, 0.3025, 0.3075: (0.000375 + 0.000375 · f / 0.35) / 0.35 is 0.1997 % on
    average.
    """
    told = sites()
    plain = worth.verdict("rose", told).halves[1].band
    told["lily"] = replace(told["lily"], digits=3)
    assert worth.verdict("rose", told).halves[1].band - plain == pytest.approx(0.0019974, abs=1e-6)


def test_of_more_seeds_than_the_table_has_the_interval_is_rather_too_wide():
    """Twenty numbers of which half are 0 and half 2: mean 1, standard deviation √(20 / 19); t of 19 is 2.093."""
    mean, half = worth.interval([0.0, 2.0] * 10)
    assert mean == 1 and 2.093 <= half * math.sqrt(19) <= 2.14


def test_halves_become_one_answer():
    assert worth.together(["tie", "yes"]) == "yes" and worth.together(["no", "yes"]) == "partly"
    assert worth.together(["tie", "tie"]) == "tie" and worth.together(["tie", "not shown"]) == "not shown"


@pytest.mark.parametrize("others", [{"lily": [0.1, 0.2]}, {"lily": [0.1, 0.2, 0]}, {"lily": [0.1, 0.2, "0.3"]}])
def test_losses_of_others_that_cannot_be_are_refused(tmp_path, others):
    site = {"held_out": 20, "loss": {"alone": [0.2] * 3, "federated": [0.1] * 3}, "others": others}
    (tmp_path / "worth.json").write_text(json.dumps({"seeds": [1, 2, 3], "sites": {"rose": site}}))
    with pytest.raises(BouquetError, match="REPORT-04"):
        comparison.read(tmp_path / "worth.json")


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_page_has_one_picture_of_all_sites_halves_with_its_legend(tmp_path):
    folder = written(tmp_path / "7", history())
    told = comparison.Worth((1, 2, 3), sites(personal=(0.198, 0.1978, 0.1976), pooled=(0.206, 0.2064, 0.2056)), "7", 6)
    comparison.write(folder / "worth.json", told)
    section = re.search(r'<section id="joining">.*?</section>', page(reading.read(folder)), re.DOTALL)[0]
    assert section.count("What joining changes at each site") == 1
    for words in ("own photos", "the others&#39; photos", "own photos, trained on at home", "own photos, all pooled"):
        assert f"<bdi>{words}</bdi>" in section
    heads = re.findall(r"<h3>(\w) · <bdi>(\w+)</bdi>", section)
    assert heads == [("A", "fern"), ("B", "lily"), ("C", "rose")]
    assert "the others&#39; photos, all pooled" not in section and "Not measured" not in section
    assert "Trained on at home has had those steps on top." in section


def test_a_band_around_none_is_as_wide_as_the_dots_interval(monkeypatch):
    drawn = Figure().subplots()
    monkeypatch.setattr(charts, "_svg", lambda draw, title, height: draw(drawn) or "")
    charts.gains({"A": [(0, 3.0, 2.0)], "B": [(1, -1.0, None)]}, "t")
    [band] = drawn.patches  # one seed has none
    [interval] = drawn.collections
    assert isinstance(band, Rectangle) and isinstance(interval, LineCollection)
    assert (band.get_x(), band.get_width()) == (-2, 4)
    assert interval.get_segments()[0][:, 0].tolist() == [1, 5]
    assert [text.get_text() for text in drawn.get_yticklabels()] == ["A", "B"]
    assert drawn.get_xlim() == pytest.approx((-5.5, 5.5))


def test_an_interval_that_would_hide_the_dots_runs_out_of_the_picture(monkeypatch):
    drawn = Figure().subplots()
    monkeypatch.setattr(charts, "_svg", lambda draw, title, height: draw(drawn) or "")
    charts.gains({"A": [(0, 1.0, 50.0)]}, "t")
    assert drawn.get_xlim() == pytest.approx((-4.4, 4.4))
