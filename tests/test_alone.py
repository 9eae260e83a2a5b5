"""What a site trained alone, handed to the other sites: they evaluate it, and nothing but that adapter moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from app import model
from app.adapter import store
from app.errors import BouquetError
from app.families import sd
from app.site import train
from bouquet import cli, worth
from bouquet.adapter import alone
from bouquet.report import comparison
from bouquet.report import worth as verdicts
from bouquet.worth import More
from tests.kit import tiny
from tests.test_worth import run_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [run_of(root, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def rose(tmp_path_factory) -> Path:
    return tiny.site(tmp_path_factory.mktemp("rose") / "data", 12)


@pytest.fixture(scope="module")
def lily(tmp_path_factory) -> Path:
    return tiny.site(tmp_path_factory.mktemp("lily") / "data", 8, seed=5)


@pytest.fixture(scope="module")
def kept(tmp_path_factory, rose, runs) -> tuple[Path, worth.Column]:
    """Where rose keeps its own, and its column."""
    folder = tmp_path_factory.mktemp("kept") / "rose.alone"
    return folder, worth.measure("rose", rose, runs, tiny.models(), tmp_path_factory.mktemp("c"), More(alone=folder))


def test_it_is_an_adapter_a_seed_whose_loss_is_that_of_the_column(kept, rose, tmp_path):
    folder, column = kept
    assert {path.name for path in folder.iterdir()} == {"1", "2", "alone.json"}
    for number, seed in enumerate((1, 2)):
        here = train.Site(tiny.config(seed=seed), tiny.models(), rose, tmp_path, "")
        model.apply_adapter(here.net, store.read_adapter(folder / str(seed)))
        assert here.evaluate() == column.loss["alone"][number]
    told = json.loads((folder / "alone.json").read_text())
    assert told == {"site": "rose", "runs": {str(s): model.adapter_hash(tiny.adapter(s)) for s in (1, 2)}, "version": 1}


def test_a_second_time_it_is_taken_from_there_and_not_trained_again(kept, rose, runs, tmp_path, monkeypatch):
    folder, column = kept
    monkeypatch.setattr(train.Site, "fit", None)
    assert worth.measure("rose", rose, runs, tiny.models(), tmp_path, More(alone=folder)) == column


def test_another_sites_is_evaluated_on_this_sites_held_out_photos(kept, lily, runs, tmp_path):
    asked = ["worth", "measure", "lily", "--data", str(lily), *map(str, runs), "--models", str(tiny.models())]
    own = ["--alone", f"{tmp_path}/lily.alone", "--others", str(kept[0])]
    assert cli.main([*asked, *own, "--out", f"{tmp_path}/lily.worth.json"]) == 0
    found = comparison.read_column(tmp_path / "lily.worth.json")
    here = train.Site(tiny.config(seed=2), tiny.models(), lily, tmp_path / "d", "")
    model.apply_adapter(here.net, store.read_adapter(kept[0] / "2"))
    assert found.others.keys() == {"rose"} and found.others["rose"][1] == here.evaluate()
    assert (tmp_path / "lily.alone" / "2").is_dir()
    comparison.write(tmp_path / "rose.worth.json", kept[1])
    worth.collect(runs[0], [tmp_path / "lily.worth.json", tmp_path / "rose.worth.json"])
    told = comparison.read(runs[0] / "worth.json")
    assert told.sites["lily"].others == found.others
    halves = verdicts.verdict("rose", told.sites).halves
    assert [(half.where, half.photos) for half in halves] == [("own", kept[1].held_out), ("others", found.held_out)]
    (runs[0] / "worth.json").unlink()


@pytest.mark.parametrize("how", ["--alone", "--others", "twice", "other runs", "not there", "no adapter"])
def test_what_is_not_the_right_ones_is_refused_by_name(kept, rose, runs, tmp_path, how):
    folder, seen = kept[0], tmp_path / "seen"
    name, more, why = {
        "--alone": ("lily", More(alone=folder), "it is rose's, and this is lily"),
        "--others": ("rose", More(others=[folder]), "it is rose's, which is this site"),
        "twice": ("lily", More(others=[folder, folder]), "it is rose's, twice"),
        "other runs": ("lily", More(others=[folder]), "beside other runs"),
        "not there": ("lily", More(others=[tmp_path]), "No such file"),
        "no adapter": ("lily", More(others=[seen]), "adapter_model.safetensors"),
    }[how]
    seen.mkdir()
    (seen / "alone.json").write_text((folder / "alone.json").read_text())
    chosen = [run_of(tmp_path / "b", 3)] if how == "other runs" else runs
    with pytest.raises(BouquetError, match="WORTH-03") as refused:
        worth.measure(name, rose, chosen, tiny.models(), tmp_path / "c", more)
    assert why in refused.value.found


def test_an_adapter_of_another_shape_is_refused(kept, runs, tmp_path):
    (tmp_path / "1").mkdir()
    store.write_peft(tmp_path / "1", {"a": torch.zeros(2)}, tiny.CONFIG, sd.FAMILY)
    (tmp_path / "alone.json").write_text((kept[0] / "alone.json").read_text())
    with pytest.raises(BouquetError, match="ADAPTER-01"):
        alone.read(tmp_path, {1: model.adapter_hash(tiny.adapter(1))}, tiny.adapter(1))


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("SITE_PRIVACY", "epsilon=8", "SITE_PRIVACY promises noise, and this was trained without"),
        ("SITE_LIMITS", "secrecy=masks", "nobody is to see this site's own adapter"),
    ],
)
def test_a_site_that_has_promised_otherwise_keeps_it_and_trains_nothing(
    rose, runs, tmp_path, monkeypatch, variable, value, why
):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(train.Site, "fit", None)
    with pytest.raises(BouquetError, match="WORTH-04") as refused:
        worth.measure("rose", rose, runs, tiny.models(), tmp_path / "c", More(alone=tmp_path / "kept"))
    assert why in refused.value.found and not (tmp_path / "kept").exists()
