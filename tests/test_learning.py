"""benchmarks/learning: the noise that a budget asks for, what is kept of a gain, a table that goes on where it was."""

from __future__ import annotations

import argparse
import json

import pytest
from conftest import sh
from PIL import Image

from benchmarks.learning import privacy
from bouquet import ROOT


def found(epsilon: str, after: float, photos: int = 200) -> privacy.Cell:
    attacks = {kind: {"auc": 0.61, "low": 0.5, "high": 0.72} for kind in ("loss", "pia")}
    noise = None if epsilon == "none" else 1.25
    return {
        "photos": photos, "epsilon": epsilon, "sites": 1, "steps": 3, "held-out": 16, "seed": 1, "noise": noise,
        "before": [0.2], "after": [after], "attacks": [attacks],
    }  # fmt: skip


@pytest.mark.parametrize(("epsilon", "noise"), [(12.5, 1.0), (4.2, 2.0)])
def test_the_noise_for_an_epsilon_is_the_least_that_keeps_to_it(epsilon, noise):
    """480 steps of 16 among 200 photos cost about 12.5 at noise 1 and 4.2 at 2 (RDP, rounded up; PLD is tighter)."""
    from app.site.accountant import Steps
    from app.site.accountant import epsilon as costs

    asked = privacy.noise_for(epsilon, 16 / 200, 480)
    assert 0.85 * noise < asked <= 1.02 * noise
    assert costs([Steps(16 / 200, asked, 480)], 1e-5) <= epsilon < costs([Steps(16 / 200, asked - 0.02, 480)], 1e-5)


def test_a_row_says_what_is_kept_of_the_gain_without_noise():
    """0.1 of a gain without noise, 0.04 with: 40 %."""
    rows = privacy.table([found("none", 0.1), found("8", 0.16), found("8", 0.16, photos=2000)]).splitlines()
    area = "0.61 [0.50, 0.72]"
    assert rows[2] == f"| 200 | none | – | 0.2000 → 0.1000 | 100 % | {area} | {area} |"
    assert rows[3] == f"| 200 | 8 | 1.25 | 0.2000 → 0.1600 | 40 % | {area} | {area} |"
    assert rows[4] == f"| 2,000 | 8 | 1.25 | 0.2000 → 0.1600 | – | {area} | {area} |"  # nothing to compare with


def test_it_goes_on_with_the_cells_that_are_not_there_and_writes_the_table_between_the_marks(tmp_path, monkeypatch):
    file, page, asked = tmp_path / "privacy.json", tmp_path / "page.md", []
    file.write_text(json.dumps([found("none", 0.1)]))
    page.write_text("before\n<!-- privacy-cost -->\nold\n<!-- /privacy-cost -->\nafter\n")
    monkeypatch.setattr(privacy, "cell", lambda *which: asked.append(which[2:]) or found(which[3], 0.16))
    few = {"photos": [200], "epsilon": ["none", "8"], "sites": 1, "steps": 3, "held_out": 16, "seed": 1}
    given = argparse.Namespace(json=file, docs=page, picture=None, quick=False, tiny=False, **few)
    assert privacy.main(given) == 0 and asked == [(200, "8")]
    assert privacy.main(given) == 0 and asked == [(200, "8")]
    told = page.read_text()
    assert told.startswith("before\n") and told.endswith("after\n") and "old" not in told and told.count("| 200 |") == 2


@pytest.mark.slow
def test_the_command_trains_and_measures_on_the_demos_base_model(tmp_path):
    files = f"--json {tmp_path}/privacy.json --picture {tmp_path}/drawn.png"
    shown = sh(f"scripts/bench privacy --tiny --sites 2 {files}", ROOT).stdout
    rows = [row for row in shown.splitlines() if row.startswith("| 8 |")]
    assert [row.split("|")[2].strip() for row in rows] == ["none", "8"], shown
    cells = json.loads((tmp_path / "privacy.json").read_text())
    assert all(len(one["attacks"]) == len(one["after"]) == 2 for one in cells) and cells[1]["noise"] > 0
    with Image.open(tmp_path / "drawn.png") as picture:  # the base model and two cells, four flowers each
        assert picture.height > 3 * 96 and picture.width > 4 * 96
