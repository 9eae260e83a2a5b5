"""bouquet site personal: the run's adapter trained on at home, by a rate that falls to nothing; it stays there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app import lora, model, records
from app.adapter import formats, store
from app.errors import BouquetError
from app.families import sd
from app.hub import history
from app.hub.history import Base, Given, Personal, Provenance
from app.site import budget, train
from bouquet import cli, worth
from bouquet.adapter import card, personal, publish
from tests.kit import tiny
from tests.test_worth import run_of

BEGAN = tiny.adapter(1)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return tiny.site(tmp_path_factory.mktemp("site") / "data", 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """4 rounds of 3 steps, of which the tail is 3."""
    folder = run_of(tmp_path_factory.mktemp("runs"), 1, rounds=4)
    told = json.loads((folder / "history.json").read_text())
    made = Provenance(
        "1", "2026-11-28T20:00:00Z", model.adapter_hash(BEGAN), Base(**told["base"]), 4, {"rose": Given(9, 9)}, 9,
        told["config"], {"torch": "2"}, history.Spent(1, 1, 2.0, 1e-5),
    )  # fmt: skip
    formats.write_final(folder, BEGAN, tiny.config(seed=1, rounds=4), sd.FAMILY, made)
    return folder


@pytest.fixture(scope="module")
def made(run, site, tmp_path_factory) -> personal.Trained:
    root = tmp_path_factory.mktemp("made")
    return personal.train(run, "rose", site, tiny.models(), root / "cache", root / "rose.personal", env={})


def evaluated(adapter: model.Adapter, site: Path, cached: Path) -> float:
    here = train.Site(tiny.config(seed=1, rounds=4), tiny.models(), site, cached, "")
    model.apply_adapter(here.net, adapter)
    return here.evaluate()


def test_what_was_exported_has_the_loss_that_is_told_of_it(made, run, site, tmp_path):
    assert made.steps == 3 and made.before == evaluated(BEGAN, site, tmp_path)
    exported = store.read_adapter(made.folder)
    assert made.after == evaluated(exported, site, tmp_path) != made.before
    for name in (formats.KOHYA, formats.DIFFUSERS):
        read = formats.read_lora(made.folder / name).adapter
        assert read.keys() == exported.keys()
        assert all(torch.allclose(read[key], exported[key], atol=1e-7) for key in read)
    assert set(formats.files(sd.FAMILY)) <= {path.name for path in (made.folder / "fp16").iterdir()}


def test_it_is_the_runs_adapter_and_steps_whose_rate_falls_to_nothing(made, site, run, tmp_path, monkeypatch):
    """The same by hand: 3 steps from the run's adapter, at 1, 2/3 and 1/3 of the run's rate."""
    seen = tiny.rates(monkeypatch)
    config = tiny.config(seed=1, rounds=1, local_steps=3, learning_rate_schedule="linear")
    here = train.Site(config, tiny.models(), site, tmp_path, "")
    model.apply_adapter(here.net, BEGAN)
    here.fit(here.privacy.seed(1, "rose", "personal"))
    assert [rate / tiny.CONFIG.learning_rate for rate in seen] == pytest.approx([1, 2 / 3, 1 / 3])
    assert tiny.equal(model.adapter_of(here.net), store.read_adapter(made.folder))
    again = personal.train(run, "rose", site, tiny.models(), tmp_path / "c", tmp_path / "again", env={})
    assert seen[3:] == pytest.approx(seen[:3]) and replace(again, folder=made.folder) == made
    files = [path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file()]
    assert len(files) == 9
    assert all((made.folder / file).read_bytes() == (again.folder / file).read_bytes() for file in files)


def test_as_many_steps_as_are_asked_for_and_never_none():
    assert personal.tail(tiny.config(rounds=1, local_steps=3), 0).local_steps == 1
    assert personal.tail(tiny.config(warmup_steps=5), 40).local_steps == 40
    assert personal.tail(tiny.config(warmup_steps=5), 40).warmup_steps == 0


def test_both_halves_are_trained_at_home_after_a_run_that_took_turns():
    assert lora.half(tiny.config(strategy="alternate"), 1) == "B"
    assert lora.half(personal.tail(tiny.config(strategy="alternate"), 3), 1) == ""


def test_its_provenance_says_what_was_done_at_home_and_promises_nothing(made, run):
    told = history.read_provenance(made.folder / history.PROVENANCE)
    before = history.read_provenance(run / "final" / history.PROVENANCE)
    exported = model.adapter_hash(store.read_adapter(made.folder))
    assert told.personal == Personal("rose", 3, model.adapter_hash(BEGAN)) and told.adapter_sha256 == exported
    assert told == replace(before, adapter_sha256=exported, privacy=None, personal=told.personal)
    assert "| trained on by one site | 3 steps |" in card.table(tiny.CONFIG, told, sd.FAMILY)
    assert "trained on by" not in card.table(tiny.CONFIG, before, sd.FAMILY)
    public = publish.provenance_for(told, named=False)
    assert public.personal == Personal("site 1", 3, model.adapter_hash(BEGAN)) and "rose" not in str(
        records.told(public)
    )


def test_in_the_comparison_it_is_a_contender_of_its_own(made, run, site, tmp_path):
    more = worth.More(personal=made.folder.parent.parent)
    found = worth.measure("rose", site, [run], tiny.models(), tmp_path, more)
    assert found.loss["personal"] == (made.after,) and found.loss["federated"] == (made.before,)
    own = worth.worth.verdict("rose", {"rose": worth.measured_of(found)})
    assert [half.who for half in own.halves] == ["federated", "personal"]


def test_of_another_run_it_is_refused(made, run, tmp_path):
    other = run_of(tmp_path, 1)
    formats.write_final(other, tiny.adapter(7), tiny.config(seed=1), sd.FAMILY)
    with pytest.raises(BouquetError, match="WORTH-03") as refused:
        personal.read(made.folder.parent.parent, other, tiny.adapter(7))
    assert "was not trained on from" in refused.value.found


def test_a_run_that_the_sites_limits_refuse_is_not_trained_on(run, site, tmp_path):
    with pytest.raises(BouquetError, match="TRUST-03"):
        env = {"SITE_LIMITS": "max-rounds=3"}
        personal.train(run, "rose", site, tiny.models(), tmp_path / "c", tmp_path / "out", env=env)
    assert not (tmp_path / "out").exists()


def test_with_differential_privacy_it_is_paid_for_as_a_round_is(run, tmp_path):
    """One round of 3 steps; where that is more than is left, nothing is trained."""
    private = tiny.site(tmp_path / "data", 48)
    cached, env = tmp_path / "cache", {"SITE_PRIVACY": "epsilon=30 noise=1"}
    made = personal.train(run, "rose", private, tiny.models(), cached, tmp_path / "out", env=env)
    [paid] = budget.spent(cached)
    assert (paid["steps"], paid["noise"], made.steps) == (3, 1.0, 3)
    assert not tiny.equal(store.read_adapter(made.folder), BEGAN)
    with pytest.raises(BouquetError, match="TRUST-15"):
        env = {"SITE_PRIVACY": f"epsilon={paid['epsilon'] * 1.01}"}
        personal.train(run, "rose", private, tiny.models(), cached, tmp_path / "more", env=env)
    assert len(budget.spent(cached)) == 1 and not (tmp_path / "more").exists()


def test_the_command_says_the_loss_before_and_after_and_where_it_lies(run, site, tmp_path, capsys):
    asked = ["site", "personal", str(run), "--data", str(site), "--name", "rose", "--steps", "2"]
    assert cli.main([*asked, "--out", f"{tmp_path}/out", "--models", str(tiny.models())]) == 0
    told = capsys.readouterr().out
    assert re.search(
        r"^2 steps at home; loss on this site's 3 held-out photos 1\.\d+ → \d\.\d+ \(−\d", told, re.MULTILINE
    )
    assert f"personal  {tmp_path}/out/{run.name}/final\n" in told
    assert history.read_provenance(tmp_path / "out" / run.name / "final" / "provenance.json").personal.steps == 2
