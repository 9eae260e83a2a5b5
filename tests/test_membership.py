"""Membership figures: their arithmetic by hand, what an adapter that knows its photos gives away, what leaves a site,
and the gate of bouquet adapter publish.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from app import families, model, records
from app.config import RunConfig
from app.errors import BouquetError, SiteError
from app.families.noise import Betas, Flow
from app.hub.history import Provenance
from app.site import cache, diffusion, journal, train
from app.site.limits import Limits
from bouquet import cli
from bouquet.adapter import card, membership, release
from bouquet.adapter.membership import Attack, Membership
from tests.kit import families as kit
from tests.kit import tiny
from tests.test_families import photos
from tests.test_worth import run_of

CPU = torch.device("cpu")
# --- how well two rows of scores are told apart -----------------------------------------------------------------------


def test_the_area_is_the_share_of_pairs_in_order_and_its_interval_delongs():
    """Three of four pairs are in order. Placements 1 and 1/2 on both sides: variance 1/8 over 2 photos, twice."""
    found = membership.attack([3.0, 1.0], [2.0, 0.0])
    half = 1.959964 * (1 / 8 / 2 + 1 / 8 / 2) ** 0.5
    assert (found.auc, found.low, found.high) == (0.75, pytest.approx(0.75 - half), 1.0)
    assert membership.attack([1.0, 1.0], [1.0, 1.0]).auc == 0.5  # ties count half
    assert membership.attack([2.0, 3.0], [0.0, 1.0]) == Attack(1.0, 1.0, 1.0)


def test_nineteen_of_twenty_intervals_hold_the_true_area():
    """Normal scores a standard deviation apart: the area is the normal's distribution at 1 / √2, 0.7602."""
    draw, hits = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        ours, others = 1 + torch.randn(60, generator=draw), torch.randn(50, generator=draw)
        found = membership.attack(ours.tolist(), others.tolist())
        hits += found.low <= 0.7602 <= found.high
    assert 0.91 < hits / 300 < 0.98


def test_the_share_at_one_per_cent_false_alarms_is_told_from_five_hundred_held_out_photos_on():
    held_out = [float(n) for n in range(500)]  # five of them, 495 to 499, may be taken for trained on
    assert membership.attack([494.5, 600.0, 3.0, 494.0], held_out).rare == 0.5
    assert membership.attack([494.5, 600.0, 3.0, 494.0], held_out[1:]).rare is None


# --- scores -----------------------------------------------------------------------------------------------------------


class Knows:
    """A family whose net has one photo by heart, and sees it under whatever noise it is shown."""

    def __init__(self, schedule: Any, photo: Tensor) -> None:
        self.schedule, self.photo = schedule, photo

    def predict(self, net: Any, noisy: Tensor, told: Tensor, given: Any) -> Tensor:
        t = told.long() if isinstance(self.schedule, Betas) else told_to_level(self.schedule, told)
        photo, noise = (share[t].view(-1, 1, 1, 1) for share in membership.shares(self.schedule, CPU))
        return self.schedule.target(self.photo.expand_as(noisy), (noisy - photo * self.photo) / noise, t)


def told_to_level(schedule: Flow, told: Tensor) -> Tensor:
    return (schedule.timesteps_K - told[:1]).abs().argmin().expand(len(told))


SIGMAS = torch.linspace(1, 0.01, 100)
SCHEDULES = {
    "epsilon": Betas(diffusers.DDPMScheduler()),
    "v": Betas(diffusers.DDPMScheduler(prediction_type="v_prediction")),
    "flow": Flow(SIGMAS, SIGMAS * 1000),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_pia_is_nothing_for_the_photo_that_a_net_knows_and_the_way_to_it_for_another(name):
    """From another photo, what the net takes for noise is off by the whole way to its own: (photo/noise) × difference,
    at the second level.
    """
    schedule, (latents, text) = SCHEDULES[name], tiny.batch(2)
    net = torch.nn.Linear(1, 1)
    net.dtype = torch.float32
    encoded = cache.Encoded.of(latents, text, text[0], ["known", "other"])
    objective = SimpleNamespace(family=Knows(schedule, latents[0]), schedule=schedule)
    found = membership._distance(net, objective, encoded, torch.tensor([0, 1]))
    photo, noise = (share[membership.levels(schedule)[1]] for share in membership.shares(schedule, CPU))
    way = (latents[1] - latents[0]).pow(4).mean() ** 0.25
    assert found[0] < 1e-2 and found[1] == pytest.approx(float(photo / noise * way), rel=1e-3)


def test_pias_levels_are_the_papers_where_the_noise_is_stable_diffusions():
    betas = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean, noisy = membership.levels(Betas(betas))
    assert clean == 0 and abs(noisy - 200) <= 1
    clean, noisy = membership.levels(SCHEDULES["flow"])
    assert clean == 99 and SIGMAS[noisy] / (1 - SIGMAS[noisy]) == pytest.approx(0.57, abs=0.02)


def encoded(count: int) -> cache.Encoded:
    """The first of 44 photos."""
    latents, text = (rows[:count] for rows in tiny.batch(44))
    return cache.Encoded.of(latents, text, torch.zeros_like(text[0]), [f"photo {n}" for n in range(count)])


@pytest.mark.parametrize("name", kit.ALL)
def test_of_every_family_the_loss_score_is_what_validation_gains_and_pia_a_distance(name):
    """A score is a photo's own, in whatever order photos are asked for."""
    run = tiny.config(base_model=name, **kit.SETTINGS)
    objective, net = train.load(kit.base(name), run, train.accelerator(run))
    known, fresh = photos(name), model.adapter_of(net)
    draw = torch.Generator().manual_seed(0)
    adapter = {key: 0.1 * torch.randn(value.shape, generator=draw) for key, value in fresh.items()}
    found = membership.scores(net, objective, known, [0, 1, 2, 3], adapter, diffusion.sha256, 4)
    gains = []
    for worn in (fresh, adapter):  # a fresh one changes nothing
        model.apply_adapter(net, worn)
        gains.append(diffusion.validation_loss(net, objective, known, CPU, timesteps=membership.LEVELS, batch_size=8))
    assert sum(found["loss"]) / 4 == pytest.approx(gains[0] - gains[1], rel=1e-4, abs=1e-6) and gains[0] != gains[1]
    assert all(-100 < one < 0 for one in found["pia"])
    again = membership.scores(net, objective, known, [3, 1], adapter, diffusion.sha256, 1)
    for kind in membership.ATTACKS:
        assert again[kind] == pytest.approx([found[kind][3], found[kind][1]], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_an_adapter_that_was_overfitted_tells_its_photos_and_one_that_learned_nothing_tells_none():
    config = tiny.config(local_steps=100, batch_size=16, learning_rate=0.02, lora_rank=16, caption_dropout=0.0)
    objective, net, everyone = diffusion.Objective.of(tiny.base()), tiny.unet(config), encoded(44)
    fresh = model.adapter_of(net)
    train.fit(net, objective, encoded(4), config, train.accelerator(config), seed=0)
    found = {}
    for name, adapter in (("overfitted", model.adapter_of(net)), ("fresh", fresh)):
        score = membership.scores(net, objective, everyone, range(44), adapter, diffusion.sha256, 44)
        found[name] = {kind: membership.attack(values[:4], values[4:]) for kind, values in score.items()}
    assert found["overfitted"]["loss"].auc > 0.9
    assert found["fresh"]["loss"].auc == 0.5
    assert found["fresh"]["pia"].low <= 0.5 <= found["fresh"]["pia"].high


# --- at a site --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sites_file_has_numbers_alone_of_the_photos_that_its_run_trained_on(tmp_path, capsys):
    """About half of 120 photos are held out, as in the run. An adapter of random numbers knows nobody: the true area is
    within twice the interval, which chance misses once in 10,000 times.
    """
    data, run = tiny.site(tmp_path / "data", 120), run_of(tmp_path, 5, validation_fraction=0.5)
    out = tmp_path / "rose.membership.json"
    asked = ["measure", "membership", "rose", str(run), "--data", str(data), "--models", str(tiny.models())]
    assert cli.main([*asked, "--out", str(out)]) == 0
    told, said = json.loads(out.read_text()), capsys.readouterr().out
    here = train.Site(tiny.config(seed=5, validation_fraction=0.5), tiny.models(), data, tmp_path / "cache", "")
    assert (told["members"], told["held_out"]) == (len(here.photos), len(here.held_out.keys))
    assert set(told) == {"site", "run", "adapter", "members", "held_out", "attacks", "version"}
    for one in told["attacks"].values():
        assert set(one) == {"auc", "low", "high"}
        assert abs(one["auc"] - 0.5) < one["high"] - one["low"] < 0.3
    assert membership.sentence(membership.read(out)) in said


def test_with_fewer_than_fifty_held_out_photos_it_cannot_be_told(tmp_path):
    data, run = tiny.site(tmp_path / "data", 12), run_of(tmp_path, 5)
    found = membership.look("rose", data, run, tiny.models(), tmp_path / "cache", 1000)
    assert found.attacks == {} and membership.highest(found) is None
    assert membership.sentence(found).startswith("cannot tell: ")
    with pytest.raises(BouquetError, match="MEASURE-01"):  # a file of weights alone: which photos were held out?
        membership.look("rose", data, run / "final" / "fp16", tiny.models(), tmp_path / "cache", 1000)


def noted(cached, run: str, images: int, number: int = 1) -> None:
    cached.mkdir(exist_ok=True)
    journal.note(cached, run=run, round=number, images=images, applied="a", sent="b")


def test_a_folder_with_other_photos_than_the_runs_last_round_is_not_measured(tmp_path, capsys):
    """Of 12 photos here all but those held out are trained on; the last round counts, of this run alone."""
    data, run, cached = tiny.site(tmp_path / "data", 12), run_of(tmp_path, 5), tmp_path / "cache"
    trained = len(train.Site(tiny.config(seed=5), tiny.models(), data, cached, "").photos)
    renamed = run.rename(tmp_path / "copy")  # the id is the provenance's
    membership.look("rose", data, renamed, tiny.models(), cached, 1000)
    assert "has no round of run 5: the figures are right only if the folder has the photos" in capsys.readouterr().out
    noted(cached, "5", trained - 2)
    noted(cached, "5", trained, number=2)
    noted(cached, "6", trained - 2)
    membership.look("rose", data, renamed, tiny.models(), cached, 1000)
    assert "has no round" not in capsys.readouterr().out
    noted(cached, "5", trained - 1, number=3)
    with pytest.raises(BouquetError, match="MEASURE-01") as refused:
        membership.look("rose", data, renamed, tiny.models(), cached, 1000)
    assert refused.value.found.startswith(
        f"round 3 of run 5 was trained on {trained - 1} photos here, and with this folder it would be {trained}:"
    )


# --- the gate ---------------------------------------------------------------------------------------------------------

SITES = ("lily", "rose")


def figures(site: str = "rose", high: float = 0.6, adapter: str = "a" * 64, **more: Any) -> Membership:
    attacks = {"loss": Attack(0.52, 0.45, 0.59), "pia": Attack(0.5, 0.4, high)}
    return replace(Membership(site, "7", adapter, 200, 60, attacks), **more)


def test_what_is_written_is_read_again_and_impossible_numbers_are_not(tmp_path):
    file = tmp_path / "rose.membership.json"
    membership.write(file, figures())
    assert membership.read(file) == figures()
    told = records.told(figures())
    wrong: list[dict[str, Any]] = [
        {"attacks": {"loss": told["attacks"]["loss"]}},  # the other is left out
        {"attacks": told["attacks"] | {"pia": {"auc": 0.5, "low": 0.6, "high": 0.7}}},
        {"attacks": told["attacks"] | {"pia": {"auc": 0.5, "low": 0.4, "high": 1.7}}},
        {"held_out": 20},  # of which no number may be told
        {"members": -1, "attacks": {}},
        {"held_out": None},
    ]
    for changes in wrong:
        file.write_text(json.dumps(told | changes))
        with pytest.raises(BouquetError, match="MEASURE-02"):
            membership.read(file)
    file.write_text(json.dumps(told | {"version": 2}))
    with pytest.raises(BouquetError, match="REPORT-05"):
        membership.read(file)


def test_figures_of_another_adapter_of_a_strange_site_or_of_one_site_twice_are_refused(tmp_path):
    for name, found in (("rose", figures()), ("again", figures()), ("strange", figures("oak"))):
        membership.write(tmp_path / name, found)
    assert release.figures([tmp_path / "rose"], "a" * 64, SITES) == {"rose": figures()}
    assert release.figures([tmp_path / "strange"], "a" * 64, ()) == {"oak": figures("oak")}  # nobody recorded the sites
    for names, adapter in ((["rose"], "b" * 64), (["rose", "again"], "a" * 64), (["strange"], "a" * 64)):
        with pytest.raises(BouquetError, match="MEASURE-02"):
            release.figures([tmp_path / name for name in names], adapter, SITES)


def code(found: dict[str, Membership], most: float, without: bool = False, sending: bool = True) -> str:
    try:
        release.check(found, SITES, most, without=without, sending=sending)
    except BouquetError as error:
        return error.code
    return ""


def test_the_upper_end_of_every_interval_of_every_site_is_held_against_the_groups_threshold():
    fine, cannot = {site: figures(site, 0.6) for site in SITES}, figures("lily", attacks={}, held_out=20)
    assert code(fine, 0.6) == "" and code(fine | {"rose": figures("rose", 0.601)}, 0.6) == "EXPORT-10"
    below = figures("rose", attacks={"loss": Attack(0.5, 0.45, 0.55), "pia": Attack(0.3, 0.2, 0.4)})
    assert membership.highest(below) == 0.8 and code(fine | {"rose": below}, 0.7) == "EXPORT-10"
    assert code(fine | {"lily": cannot}, 0.6) == "EXPORT-10"  # what cannot be told is not below anything
    assert code(fine | {"lily": cannot}, 1.0) == ""  # no threshold: it is said in the card
    assert code({"rose": figures("rose", 0.7)}, 0.6, sending=False) == "EXPORT-10"  # also before anything is sent


def test_without_figures_nothing_is_sent_unless_that_is_said_and_the_group_has_no_threshold():
    for found in ({}, {"rose": figures()}):
        assert code(found, 1.0) == "EXPORT-09" and code(found, 1.0, without=True) == ""
        assert code(found, 0.6, without=True) == "EXPORT-09"
        assert code(found, 0.6, sending=False) == ""


def test_a_threshold_is_part_of_what_a_site_can_ask_of_runs():
    Limits.read("max-release-auc=0.6").check(RunConfig(release_auc=0.6))
    with pytest.raises(SiteError, match="TRUST-03"):
        Limits.read("max-release-auc=0.6").check(RunConfig())
    with pytest.raises(BouquetError, match="CONFIG-02"):
        RunConfig.read({"release-auc": 0.4})


def page(section: str) -> str:
    return card.card("garden/flowers", tiny.config(), Provenance(), [], "mit", "", families.of(tiny.base()), section)


def test_the_card_has_the_figures_by_number_calls_them_a_lower_bound_and_says_when_there_are_none():
    found = {"lily": figures("lily", attacks={}, held_out=20), "rose": figures()}
    shown = page(release.section(found, {"lily": "site 1", "rose": "site 2", "oak": "site 3"}, 1.0))
    assert "| site 1 | 200 / 20 | cannot tell | cannot tell |" in shown
    assert "| site 2 | 200 / 60 | 0.52 [0.45, 0.59] | 0.50 [0.40, 0.60] |" in shown
    assert "| site 3 | not measured | – | – |" in shown
    assert "a lower bound" in shown and "no threshold" in shown and "rose" not in shown
    assert "above 0.6." in page(release.section(found, {}, 0.6))
    assert release.section({}, {}, 1.0) == "" and "**Not measured.**" in page("")


def test_what_the_audit_log_says_names_every_site():
    told = release.words({"rose": figures()}, SITES)
    assert told == (
        "rose: loss 0.52 [0.45, 0.59]; pia 0.50 [0.40, 0.60] (200 photos trained on, 60 held out) | lily: not measured"
    )
