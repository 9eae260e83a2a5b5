"""bouquet worth: a site's own training at the run's steps and seeds, numbers alone in its column, and the hub's
worth.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import sh
from PIL import Image

from app import model, records
from app.adapter import formats, sample
from app.errors import BouquetError
from app.families import sd
from app.hub import history
from app.site import budget, privacy, train
from app.site.photos import data
from bouquet import ROOT, worth
from bouquet.report import pictures
from bouquet.report.page import page
from bouquet.report.reading import read
from tests.kit import tiny


def run_of(root: Path, seed: int, **changes) -> Path:
    """A finished run of the tiny base, with an adapter of random numbers."""
    config = tiny.config(seed=seed, **changes)
    folder = root / f"run-{seed}"
    adapter = tiny.adapter(seed, tiny.CONFIG)
    provenance = history.Provenance(str(seed), adapter_sha256=model.adapter_hash(adapter))
    formats.write_final(folder, adapter, config, sd.FAMILY, provenance)
    told = {
        "run": str(seed),
        "state": "finished",
        "config": asdict(config),
        "base": {"name": "tiny", "fingerprint": model.fingerprint(tiny.base())["base"]},
    }
    (folder / "history.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return tiny.site(tmp_path_factory.mktemp("worth") / "data", 12)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [run_of(root, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def column(site, runs, tmp_path_factory) -> dict:
    other = tiny.site(tmp_path_factory.mktemp("other") / "data", 12, seed=5)
    more = worth.More(pool=[other])
    found = worth.measure("rose", site, runs, tiny.models(), tmp_path_factory.mktemp("cache"), more)
    return records.told(found)


@pytest.mark.slow
def test_each_number_is_the_fixed_noise_loss_of_that_adapter_on_the_sites_held_out_photos(column, site, tmp_path):
    here = train.Site(tiny.config(seed=2), tiny.models(), site, tmp_path, "")
    model.apply_adapter(here.net, tiny.adapter(2))
    assert column["loss"]["federated"][1] == here.evaluate()
    model.apply_adapter(here.net, tiny.fresh(tiny.config(seed=2)))
    assert column["loss"]["base"][1] == here.evaluate()
    for number in (1, 2):
        here.fit(here.privacy.seed(2, "rose", number), number)
    assert column["loss"]["alone"][1] == here.evaluate()


def test_alone_takes_the_steps_that_a_site_takes_in_the_run(column):
    assert column["steps"] == tiny.CONFIG.rounds * tiny.CONFIG.local_steps == 6
    assert column["seeds"] == [1, 2] and set(column["loss"]) == {"base", "alone", "federated", "pooled"}


def test_every_contenders_rate_falls_over_the_last_quarter_of_its_own_steps(site, runs, tmp_path, monkeypatch):
    """Alone takes 2 rounds of 3 steps, the last 1.5 of which fall; pooled takes 4, the last 3 of which fall."""
    seen = tiny.rates(monkeypatch)
    other = tiny.site(tmp_path / "other", 12, seed=5)
    worth.measure("rose", site, runs[:1], tiny.models(), tmp_path / "cache", worth.More(pool=[other]))
    shares = [rate / tiny.CONFIG.learning_rate for rate in seen]
    assert shares[:6] == pytest.approx([1, 1, 1, 1, 1, 1 / 1.5])
    assert shares[6:] == pytest.approx([1] * 10 + [2 / 3, 1 / 3])


def test_a_run_from_before_there_were_schedules_is_compared_with_a_constant_rate(runs):
    told = history.read(runs[0] / "history.json")
    before = {key: value for key, value in told.config.items() if key != "learning_rate_schedule"}
    assert worth.config_of(told, runs[0]).learning_rate_schedule == "tail"
    assert worth.config_of(replace(told, config=before), runs[0]).learning_rate_schedule == "constant"


def test_a_run_of_keys_that_are_refused_by_now_is_compared_as_it_was(tmp_path):
    run = run_of(tmp_path, 9, strategy="median", min_sites=2)
    assert worth.alike([run])[0].strategy == "median"


def test_who_trains_alone_trains_both_halves_where_the_run_took_turns(column, site, tmp_path):
    run = run_of(tmp_path / "run", 1, strategy="alternate")
    found = worth.measure("rose", site, [run], tiny.models(), tmp_path / "cache", worth.More())
    assert found.loss["alone"][0] == column["loss"]["alone"][0]


def test_a_column_holds_numbers_and_the_sites_name_alone(column):
    assert set(column) == {"site", "seeds", "steps", "held_out", "loss", "runs", "version"} and column["site"] == "rose"
    assert all(type(value) is float for values in column["loss"].values() for value in values)


def test_pooled_photos_hold_out_what_the_site_holds_out(site, tmp_path):
    other = tiny.site(tmp_path / "other", 12, seed=5)
    folder = worth.together([site, other], tmp_path / "photos")
    alone = train.Site(tiny.CONFIG, tiny.models(), site, tmp_path / "one", "")
    pooled = train.Site(tiny.CONFIG, tiny.models(), folder, tmp_path / "two", "")
    assert len(pooled.train.keys) + len(pooled.held_out.keys) == 24
    assert set(alone.held_out.keys) <= set(pooled.held_out.keys)


def test_a_photo_that_the_site_holds_out_as_the_nearest_is_not_learned_in_the_pool(tmp_path, monkeypatch):
    """Of this folder's two photos neither is held out by its bytes alone, so it holds out the nearest; a pool with many
    more would train on it.
    """
    small, other = tiny.site(tmp_path / "small", 2, seed=3), tiny.site(tmp_path / "other", 30, seed=5)
    config = replace(tiny.CONFIG, validation_fraction=0.1, batch_size=1)
    site = train.Site(config, tiny.models(), small, tmp_path / "one", "")
    assert not set(site.held_out.keys) <= set(
        train.Site(
            config, tiny.models(), worth.together([small, other], tmp_path / "p"), tmp_path / "two", ""
        ).held_out.keys
    )
    learned = []
    monkeypatch.setattr(worth, "alone", lambda pool, *_: learned.extend(pool.train.keys))
    worth.pooled(site, {}, [small, other], tiny.models())
    assert len(learned) > 25 and not set(site.held_out.keys) & set(learned)


def test_who_pools_photos_pools_the_class_images_that_the_run_asks_for(tmp_path, monkeypatch):
    """Seven pictures of one site's and five of the other's; the third has none."""
    folders = [tiny.site(tmp_path / name, 8, seed=number) for number, name in enumerate("abc")]
    for folder, count in zip(folders, (7, 5), strict=False):
        tiny.site(folder / "class-images", count, seed=50 + count)
        everybodys = (*data.look(folder).photos, *data.look(folder / "class-images").photos)
        privacy.declare_public(folder, everybodys)
    seen = []
    monkeypatch.setattr(worth, "alone", lambda pool, *_: seen.extend(pool.prior.keys))
    site = train.Site(tiny.config(prior_loss_weight=1.0), tiny.models(), folders[0], tmp_path / "one", "")
    worth.pooled(site, {}, folders, tiny.models())
    assert len(seen) == 12 and set(site.prior.keys) < set(seen)


def test_a_run_that_went_on_is_compared_with_one_that_was_never_cut_off(tmp_path):
    """As is one that was waited for longer: neither changes the adapter."""
    runs = [run_of(tmp_path, 1), run_of(tmp_path, 2, resume="1"), run_of(tmp_path, 3, round_timeout=99)]
    assert [config.seed for config in worth.alike(runs)] == [1, 2, 3]


def test_a_run_that_began_with_a_file_is_compared_with_nobody(tmp_path):
    run = run_of(tmp_path, 1, start_from="began.safetensors")
    told = json.loads((run / "history.json").read_text())
    told["started_from"] = {"file": "began.safetensors", "sha256": "ab", "adapter": "cd"}
    (run / "history.json").write_text(json.dumps(told))
    with pytest.raises(BouquetError, match="WORTH-01") as refused:
        worth.alike([run])
    assert "run-1 began with a LoRA file" in refused.value.found and "start-from" in refused.value.fix


@pytest.mark.parametrize("spoil", ["the same seed", "other steps", "not finished"])
def test_runs_that_cannot_be_compared_are_named(tmp_path, spoil):
    one = run_of(tmp_path / "a", 1)
    other = run_of(
        tmp_path / "b", 1 if spoil == "the same seed" else 2, **({"local_steps": 9} if spoil == "other steps" else {})
    )
    if spoil == "not finished":
        told = json.loads((other / "history.json").read_text())
        (other / "history.json").write_text(json.dumps(told | {"state": "failed"}))
    with pytest.raises(BouquetError, match="WORTH-01") as refused:
        worth.alike([one, other])
    assert "run-1: finished, seed 1" in refused.value.found
    assert ("another local-steps" in refused.value.found) == (spoil == "other steps")


@pytest.mark.parametrize("whose", ["the other site's", "the hub's"])
def test_columns_of_other_runs_with_the_same_seeds_are_refused(tmp_path, column, runs, whose):
    other = column["runs"] | {"2": "0" * 64} if whose == "the other site's" else {"1": "0" * 64, "2": "1" * 64}
    mine = column["runs"] if whose == "the other site's" else other
    for name, measured in (("rose", mine), ("lily", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(column | {"site": name, "runs": measured}))
    with pytest.raises(BouquetError, match="WORTH-02") as refused:
        worth.collect(runs[0], [tmp_path / "rose.json", tmp_path / "lily.json"])
    assert refused.value.found == (
        "lily has measured other runs than rose, of the same seeds"
        if whose == "the other site's"
        else "rose has measured runs of which run-1 is none"
    )


@pytest.mark.parametrize(
    "numbers",
    [
        {"loss": {"alone": [1e-310] * 2, "federated": [1.0, 1.0]}},
        {"loss": {"alone": [1e11] * 2, "federated": [1.0, 1.0]}},
        {"judge": {"alone": [-0.1, 0.5], "federated": [0.5, 0.5]}},
        {"judge": {"alone": [0.5, 0.5], "federated": [1.1, 0.5]}},
    ],
)
def test_a_column_of_numbers_that_nothing_measures_is_refused_and_leaves_no_file(tmp_path, column, numbers):
    run = run_of(tmp_path, 1)
    (tmp_path / "rose.json").write_text(json.dumps({**column, "runs": None, **numbers}))
    with pytest.raises(BouquetError, match="REPORT-04"):
        worth.collect(run, [tmp_path / "rose.json"])
    assert not (run / "worth.json").exists()


def test_a_site_with_private_photos_says_that_its_losses_are_rounded(tmp_path):
    folder, cached = tiny.site(tmp_path / "data", 40, public=False), tmp_path / "cache"
    train.Site(tiny.config(local_steps=4), tiny.models(), folder, cached, "", secret=privacy.Secret.MADE)
    run = run_of(tmp_path, 1, local_steps=4)
    found = worth.measure("rose", folder, [run], tiny.models(), cached, worth.More())
    assert found.digits == 3 and all(len(f"{v:.9g}") <= 5 for values in found.loss.values() for v in values)


def test_a_loss_of_fewer_private_photos_than_the_floor_stays_where_a_promise_lets_a_run_hold_out_one(
    tmp_path, monkeypatch
):
    folder, cached = tiny.site(tmp_path / "data", 14, public=False), tmp_path / "cache"
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=8")
    promise = budget.of(os.environ, cached)
    how = {"validation_fraction": 0.1, "local_steps": 4}
    train.Site(tiny.config(**how), tiny.models(), folder, cached, "", secret=privacy.Secret.MADE, promise=promise)
    runs = [run_of(tmp_path, 1, **how)]
    monkeypatch.setattr(worth, "alone", None)  # before anything is trained
    with pytest.raises(BouquetError, match="WORTH-04") as refused:
        worth.measure("rose", folder, runs[:1], tiny.models(), cached, worth.More())
    assert "a loss of fewer than 8 stays" in refused.value.found


def test_columns_of_other_seeds_are_refused(tmp_path, column, runs):
    for name, seeds in (("rose", [1, 2]), ("lily", [1, 3])):
        (tmp_path / f"{name}.json").write_text(json.dumps(column | {"site": name, "seeds": seeds}))
    with pytest.raises(BouquetError, match="WORTH-02") as refused:
        worth.collect(runs[0], [tmp_path / "rose.json", tmp_path / "lily.json"])
    assert "lily: seeds [1, 3]" in refused.value.found


@pytest.mark.slow
def test_what_each_contender_draws_goes_into_the_report_for_the_site_that_sent_it(tmp_path, site, runs):
    done = sh(
        f"scripts/bouquet worth measure rose --data {site} {runs[0]} --pictures --models {tiny.models()} --out"
        f" {tmp_path}/rose.worth.json",
        ROOT,
    )
    assert f"picture  {tmp_path}/rose.worth.png" in done.stdout and "picture" not in json.loads(
        (tmp_path / "rose.worth.json").read_text()
    )
    (tmp_path / "lily.worth.json").write_text(
        json.dumps(json.loads((tmp_path / "rose.worth.json").read_text()) | {"site": "lily"})
    )
    with Image.open(tmp_path / "rose.worth.png") as drawn:
        assert pictures.layout(drawn.size, list(tiny.CONFIG.prompts), 16)[3] == 3  # base, alone, federated
        base, federated = (drawn.crop(box) for box in cells(drawn.size, (0, 2)))
    assert base.tobytes() == cell_of(None).tobytes() and federated.tobytes() == cell_of(tiny.adapter(1)).tobytes()
    worth.collect(runs[0], [tmp_path / "rose.worth.json", tmp_path / "lily.worth.json"])
    told = read(runs[0])
    assert told.worth.sites["rose"].picture and not told.worth.sites["lily"].picture
    assert page(told).count('alt="What each contender draws of the same prompts"') == 1
    (runs[0] / "worth.json").unlink()


def test_pictures_of_runs_without_prompts_are_refused_before_anything_is_trained(tmp_path, site, monkeypatch):
    run = run_of(tmp_path, 1, sample_prompts="")
    monkeypatch.setattr(worth, "alone", None)
    with pytest.raises(BouquetError, match="EXPORT-11"):
        worth.measure("rose", site, [run], tiny.models(), tmp_path / "c", worth.More(shown=tmp_path / "rose.png"))


def cells(size: tuple[int, int], rows: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """The boxes of the first prompt's pictures in these rows of a sheet."""
    cell, left, top, _ = pictures.layout(size, list(tiny.CONFIG.prompts), 16)
    return [
        (left, top + row * (cell + pictures.GAP), left + cell, top + row * (cell + pictures.GAP) + cell) for row in rows
    ]


def cell_of(adapter) -> Image.Image:
    """The first prompt's picture as the sheet shows it."""
    config = tiny.config(seed=1)
    [image, _] = sample.render(sample.pipeline(tiny.base(), config), adapter, config.prompts, config)
    return image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n and no more", None])
def test_a_picture_that_is_none_is_refused_when_the_hub_collects(tmp_path, column, runs, content):
    (tmp_path / "rose.json").write_text(json.dumps(column))
    if content is None:
        Image.new("RGB", (8200, 8)).save(tmp_path / "rose.png")
    else:
        (tmp_path / "rose.png").write_bytes(content)
    with pytest.raises(BouquetError, match="REPORT-04"):
        worth.collect(runs[0], [tmp_path / "rose.json"])
    assert not (runs[0] / "worth.json").exists()


@pytest.mark.slow
def test_measured_at_two_sites_and_collected_at_the_hub_the_report_has_a_sentence_a_site(tmp_path, site, runs):
    done = sh(
        f"scripts/bouquet worth measure rose --data {site} {runs[0]} {runs[1]} --models {tiny.models()} --out"
        f" {tmp_path}/rose.worth.json",
        ROOT,
    )
    assert "held-out photos the federated adapter's loss is" in done.stdout
    (tmp_path / "lily.worth.json").write_text(
        json.dumps(json.loads((tmp_path / "rose.worth.json").read_text()) | {"site": "lily"})
    )
    sh(f"scripts/bouquet worth collect {runs[0]} {tmp_path}/rose.worth.json {tmp_path}/lily.worth.json", ROOT)
    told = read(runs[0]).worth
    assert set(told.sites) == {"rose", "lily"} and told.seeds == (1, 2)
    sh(f"scripts/bouquet report {runs[0]} --out {tmp_path}/report.html", ROOT)
    assert (tmp_path / "report.html").read_text().count("held-out photos the federated adapter") == 2
