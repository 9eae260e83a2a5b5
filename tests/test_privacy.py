"""What a hub can find out about one photo from the numbers that it asks for: the attacks that worked, and what stands
against them.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from app import model
from app.adapter import store
from app.errors import BouquetError, SiteError
from app.site import diffusion, journal, privacy, train
from app.site.limits import Limits
from app.site.photos import data
from app.site.photos.data import Photo
from app.site.privacy import PUBLIC, Privacy, Secret
from tests.kit import tiny
from tests.kit.memory import Federation

SECRET = bytes(range(32))
PRIVATE = Privacy(SECRET)
NO_LIMITS = Limits()
NO_FLOORS = Limits.read("min-held-out=1 min-photos=1 min-step-images=1 min-local-steps=1")


def photos(count: int, start: int = 0) -> tuple[Photo, ...]:
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)]
    return tuple(Photo(key, "a rose", "x.png", bytes) for key in keys)


def site(folder: Path, limits: Limits = NO_LIMITS, secret: Secret = Secret.MADE, **changes) -> train.Site:
    """A site with private photos, as a message of a run finds it; its cache is `cache` beside its folder."""
    return train.Site(
        tiny.config(**{"local_steps": 4, **changes}),
        tiny.models(),
        folder,
        folder.parent / "cache",
        "",
        limits=limits,
        secret=secret,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.site(tmp_path / "data", 24, public=False)


# --- a photo is confirmed by the held-out loss
# -------------------------------------------------------------------------


def guesses(base_site: train.Site) -> list[float]:
    """For every photo, were it the only one held out: the loss the hub computes for it from what all know."""
    losses = []
    every = [(part, number) for part in (base_site.train, base_site.held_out) for number in range(len(part.keys))]
    for known, number in every:
        one = torch.tensor([number])
        alone = type(known)(
            known.latents_NChw[one], known.texts, known.text_N[one], known.sizes_R6[one], [known.keys[number]]
        )
        losses.append(
            diffusion.validation_loss(
                base_site.net, base_site.objective, alone, torch.device("cpu"), timesteps=2, batch_size=4
            )
        )
    return losses


def test_where_all_is_public_one_held_out_photo_is_confirmed_to_the_last_bit(tmp_path):
    """The attack works: this is what a site's secret and floors are for."""
    here = site(tiny.site(tmp_path / "data", 24), validation_fraction=0.01)
    assert len(here.held_out.keys) == 1
    assert here.evaluate() in guesses(here)


def test_a_private_sites_loss_is_about_at_least_eight_photos_and_fits_none_of_them(folder):
    here = site(folder, validation_fraction=0.01)
    assert len(here.held_out.keys) == 8
    loss = here.evaluate()
    assert all(abs(loss - guess) > 1e-6 for guess in guesses(here))


def test_even_one_held_out_photo_is_not_confirmed_where_the_site_has_lowered_its_floors(folder):
    """The noise is the site's own: the loss that the hub computes for the right photo is another one."""
    here = site(folder, NO_FLOORS, validation_fraction=0.01)
    assert len(here.held_out.keys) == 1
    assert min(abs(here.evaluate() - guess) for guess in guesses(here)) > 1e-6


def test_a_run_cannot_choose_who_is_held_out():
    sides = {PRIVATE.split(photos(100), 0.1, seed, group=8)[1] for seed in range(20)}
    assert len(sides) == 1
    assert len({PUBLIC.split(photos(100), 0.1, seed)[1] for seed in range(20)}) == 20


def test_two_fractions_differ_by_whole_groups_of_photos_or_by_none():
    """Of 100 photos in groups of 8: 1 % and 5 % are one group, 13 % is two (13/8 is nearer to 2), 50 % is six."""
    held = {
        fraction: set(PRIVATE.split(photos(100), fraction, 0, group=8)[1]) for fraction in (0.01, 0.05, 0.13, 0.3, 0.5)
    }
    assert [len(held[fraction]) for fraction in (0.01, 0.05, 0.13, 0.3, 0.5)] == [8, 8, 16, 32, 48]
    assert held[0.01] == held[0.05] < held[0.13] < held[0.3] < held[0.5]


def test_nobody_without_the_secret_knows_who_is_held_out():
    """Of 8 in 100 chosen by two secrets, or by a secret and by what everybody knows, fewer than half are the same by
    far.
    """
    some = photos(100)
    mine, another, known = (Privacy(bytes([n]) * 32).split(some, 0.1, 0, group=8)[1] for n in (1, 2, 0))
    assert mine != another and mine != known and len(set(mine) & set(another)) < 4
    assert mine == Privacy(bytes([1]) * 32).split(some[::-1], 0.1, 7, group=8)[1][::-1]


# --- a photo is confirmed by recomputing the reply
# ---------------------------------------------------------------------


def test_a_run_of_one_photo_a_step_is_refused_before_anything_is_trained(folder):
    with pytest.raises(SiteError, match="TRUST-03"):
        site(folder, batch_size=1, local_steps=1, caption_dropout=1.0)


def test_a_reply_cannot_be_computed_again_by_who_knows_the_run_the_photos_and_the_code(folder, tmp_path):
    """The hub has every photo of the site, and knows whom it holds out; what it trains from them is another adapter all
    the same.
    """
    config = {"batch_size": 1, "local_steps": 1, "caption_dropout": 1.0}
    here = site(folder, NO_FLOORS, **config)
    here.fit(here.privacy.seed(42, "site-1", 1))
    sent = model.adapter_of(here.net)

    again = site(folder, NO_FLOORS, **config)
    again.fit(again.privacy.seed(42, "site-1", 1))
    assert tiny.equal(sent, model.adapter_of(again.net))  # the site itself, after a restart: bit for bit

    hub = site(folder, NO_FLOORS, **config)
    hub.fit(PUBLIC.seed(42, "site-1", 1))
    guess = model.adapter_of(hub.net)
    different = [(sent[key] != guess[key]).float().mean().item() for key in sent if key.endswith("lora_B.weight")]
    assert sum(different) / len(different) > 0.3


# --- whose secret, and where it is
# -----------------------------------------------------------------------------------------


def test_the_secret_is_made_once_for_the_site_alone_and_kept(folder, tmp_path):
    first = site(folder).privacy
    file = tmp_path / "cache" / privacy.FILE
    assert len(first.secret) == 32 and file.stat().st_mode & 0o777 == 0o600
    assert site(folder).privacy == first
    other = tiny.site(tmp_path / "other" / "data", 24, public=False)
    assert site(other).privacy != first


def test_the_secret_is_in_no_text_of_it():
    assert (
        SECRET.hex() not in f"{PRIVATE} {PRIVATE!r}"
        and repr(SECRET) not in f"{PRIVATE} {PRIVATE!r}"
        and str(PRIVATE) == "private"
    )


@pytest.mark.parametrize("content", [None, "", "not hexadecimal", "00" * 31, "00" * 33])
def test_a_secret_that_is_lost_or_damaged_is_named_by_who_measures_at_the_site(folder, tmp_path, content):
    (tmp_path / "cache").mkdir()
    if content is not None:
        (tmp_path / "cache" / privacy.FILE).write_text(content)
    with pytest.raises(SiteError, match="SITE-14") as refused:
        site(folder, secret=Secret.KEPT)
    assert "--cache" in refused.value.fix and str(tmp_path) not in str(refused.value)


def test_a_damaged_secret_is_not_replaced_silently_in_a_run(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / privacy.FILE).write_text("half")
    with pytest.raises(SiteError, match="SITE-14"):
        site(folder)


def test_in_a_simulation_nothing_is_secret(folder, tmp_path):
    assert site(folder, secret=Secret.NONE).privacy == PUBLIC
    assert not (tmp_path / "cache" / privacy.FILE).exists()


# --- public photos
# -----------------------------------------------------------------------------------------------------------


def test_photos_are_public_only_as_long_as_the_folder_lists_every_one_of_them(tmp_path):
    folder = tiny.site(tmp_path / "data", 24)
    scanned = data.scan(folder).photos
    assert privacy.is_public(folder, scanned) and privacy.is_public(folder, scanned[:3])
    other = tiny.site(tmp_path / "other", 2, seed=9)
    (folder / "own.png").write_bytes((other / "0000.png").read_bytes())
    (folder / "caption.txt").write_text("a rose")
    assert not privacy.is_public(folder, data.scan(folder).photos)


def test_another_caption_makes_a_public_photo_private(tmp_path):
    folder = tiny.site(tmp_path / "data", 4)
    lines = (folder / "metadata.jsonl").read_text().replace("a white lily", "Mrs Miller's lily")
    (folder / "metadata.jsonl").write_text(lines)
    assert not privacy.is_public(folder, data.scan(folder).photos)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"all\n"])
def test_a_list_that_says_nothing_makes_nothing_public(tmp_path, content):
    folder = tiny.site(tmp_path / "data", 4)
    (folder / ".public").write_bytes(content)
    assert not privacy.is_public(folder, data.scan(folder).photos)


def test_a_list_that_is_taken_away_between_two_rounds_makes_the_photos_private(tmp_path):
    folder = tiny.site(tmp_path / "data", 24)
    here = site(folder)
    assert not here.privacy.private
    (folder / ".public").unlink()
    here.get_ready("")
    assert here.privacy.private and len(here.held_out.keys) == 8


def test_public_photos_are_divided_as_before_by_the_hash_and_the_runs_seed():
    train_, held = PUBLIC.split(photos(1000), 0.1, seed=0)
    below = {p.key for p in photos(1000) if int(hashlib.sha256(f"0:{p.key}".encode()).hexdigest(), 16) < 2**256 * 0.1}
    assert {p.key for p in held} == below and len(train_) + len(held) == 1000
    assert 70 < len(held) < 130  # 100 expected, standard deviation 9.5


def test_adding_public_photos_moves_no_other_between_the_sides():
    before, after = PUBLIC.split(photos(200), 0.1, seed=3), PUBLIC.split(photos(400), 0.1, seed=3)
    assert set(before[0]) <= set(after[0]) and set(before[1]) <= set(after[1])


@pytest.mark.parametrize("one", [PUBLIC, PRIVATE])
@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_two_photos_always_give_one_to_each_side(one, fraction):
    trained, held = one.split(photos(2), fraction, seed=0)
    assert len(trained) == len(held) == 1 and trained != held


def test_a_public_digest_is_sha256_and_a_private_one_hmac():
    """RFC 4231, test case 2."""
    assert PUBLIC.digest("a rose") == hashlib.sha256(b"a rose").digest()
    jefe = Privacy(b"Jefe").digest("what do ya want for nothing?")
    assert jefe.hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"


# --- numbers
# -----------------------------------------------------------------------------------------------------------------


def test_numbers_leave_to_three_digits_and_counts_to_two():
    told = {
        "loss": 0.205649,
        "seconds": 1234.6,
        "small": 1.23456e-7,
        "none": 0.0,
        "photos": 1999,
        "few": 99,
        "hundred": 109,
        "no": 0,
    }
    assert PRIVATE.told(told) == {
        "loss": 0.206,
        "seconds": 1230.0,
        "small": 1.23e-7,
        "none": 0.0,
        "photos": 1900,
        "few": 99,
        "hundred": 100,
        "no": 0,
    }
    assert PUBLIC.told(told) == told


def rounded(value: float) -> bool:
    return value == 0 or math.isclose(value, float(f"{value:.2e}"), rel_tol=1e-12)


@pytest.fixture
def private_run(tmp_path, monkeypatch) -> tuple[Federation, Path]:
    federation = Federation(
        tmp_path, public=False, counts={"site-1": 24, "site-2": 173}, local_steps=4, sample_prompts=""
    )
    return federation, federation.go(monkeypatch)


@pytest.mark.slow
def test_a_run_over_private_photos_goes_well_and_hears_rounded_numbers_alone(private_run):
    federation, folder = private_run
    assert federation.history()["state"] == "finished"
    replies = [reply.content["metrics"] for _, _, reply in federation.grid.came]
    assert len(replies) == 6 and all(rounded(value) for numbers in replies for value in numbers.values())
    sites = federation.history()["rounds"][0]["sites"]
    # of 173: 40 held out, 133 told as 130
    assert (sites["site-1"]["num-examples"], sites["site-2"]["num-examples"]) == (16, 130)


@pytest.mark.parametrize("public", [True, False])
def test_what_a_run_could_word_as_a_question_about_one_photo_is_told_of_public_photos_alone(
    tmp_path, monkeypatch, public
):
    """How many captions are too long follows from the trigger word, how many are enlarged from the resolution."""
    run = {"trigger_word": "q " * 49 + "q", "resolution": 24, "local_steps": 4, "sample_prompts": ""}
    federation = Federation(tmp_path, public, {"site-1": 24, "site-2": 24}, **run)
    federation.go(monkeypatch)
    told = [reply.content["metrics"] for _, _, reply in federation.grid.came]
    assert [("captions-cut" in numbers, "enlarged" in numbers) for numbers in told] == [(public, public)] * len(told)
    noted = journal.read(federation.root / "cache/site-1")
    assert all(entry["enlarged"] == 24 for entry in noted if "images" in entry)  # the site knows


@pytest.mark.slow
def test_what_leaves_and_what_is_logged_has_nothing_of_the_secret(private_run, capfd):
    federation, folder = private_run
    said = "".join(capfd.readouterr())
    for name in ("site-1", "site-2"):
        secret = (federation.root / "cache" / name / privacy.FILE).read_text().strip()
        left = b"".join(
            json.dumps(dict(r.content["metrics"])).encode() + bytes(r.content["arrays"]["adapter.safetensors"].data)
            for _, _, r in federation.grid.came
            if "arrays" in r.content
        )
        assert secret not in said and secret.encode() not in left and bytes.fromhex(secret) not in left
        assert all(secret not in file.read_text() for file in folder.glob("*.json"))


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_goes_on_bit_for_bit_with_the_sites_secret(private_run, tmp_path, monkeypatch):
    federation, whole = private_run
    federation.run_config["rounds"] = 1
    federation.go(monkeypatch, run_id=8)
    federation.run_config |= {"rounds": 2, "resume": "8"}
    resumed = federation.go(monkeypatch, run_id=9)
    assert tiny.equal(store.read_adapter(resumed / "final"), store.read_adapter(whole / "final"))
    (tmp_path / "cache" / "site-1" / privacy.FILE).unlink()
    again = federation.go(monkeypatch, run_id=10)
    assert not tiny.equal(store.read_adapter(again / "final"), store.read_adapter(whole / "final"))


@pytest.mark.slow
def test_a_site_that_has_answered_enough_this_week_refuses_the_next_run_by_name(private_run, monkeypatch):
    federation, _ = private_run
    for own in federation.own.values():
        own["limits"] = "max-messages-a-week=5"  # three were answered: two rounds and an evaluation
    federation.grid.run_id = 8
    error = federation.fails(monkeypatch, "HUB-02", run_id=8)
    assert str(error).count("TRUST-10 The site has answered as much as it allows in a week.") == 2
    assert len(journal.read(federation.root / "cache" / "site-1")) == 3


def test_a_site_with_too_few_private_photos_says_so_to_the_hub_and_the_rest_to_its_log(tmp_path, monkeypatch, capfd):
    federation = Federation(
        tmp_path, public=False, counts={"site-1": 12, "site-2": 14}, local_steps=4, sample_prompts=""
    )
    assert "SITE-02 Too few training images." in str(federation.fails(monkeypatch, "HUB-02"))
    assert "holds 12 usable .png, .jpg or .webp images; 16 are needed" in capfd.readouterr().out


def test_the_floors_hold_before_a_photo_is_encoded(folder, tmp_path):
    with pytest.raises(BouquetError, match="TRUST-03"):
        site(folder, batch_size=2, local_steps=4)
    assert not list((tmp_path / "cache").glob("latents-*"))
