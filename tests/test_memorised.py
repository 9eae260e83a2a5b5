"""What of a site's distances leaves it: counts as a run tells them, and nothing of too few held-out photos."""

from __future__ import annotations

import os

import pytest
import torch

from app.adapter import sample
from app.errors import BouquetError
from app.site import budget, privacy, train
from app.site.limits import Limits
from bouquet.adapter import memorised
from bouquet.report.memorisation import SiteMemory
from tests.kit import tiny
from tests.test_worth import run_of

HOW = {"local_steps": 4, "batch_size": 4, "validation_fraction": 0.5}


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """A look at a site with that many private photos, all of whose captions may be drawn; no picture is."""
    monkeypatch.setattr(sample, "pipeline", lambda *_: None)
    monkeypatch.setattr(sample, "render", lambda _, __, texts, ___: texts)

    def look(photos: int, **how) -> tuple[SiteMemory, train.Site]:
        folder, cached = tiny.site(tmp_path / "data", photos, public=False), tmp_path / "cache"
        more = {"limits": Limits(), "secret": privacy.Secret.MADE, "promise": budget.of(os.environ, cached)}
        settings = HOW | how
        here = train.Site(tiny.config(seed=5, **settings), tiny.models(), folder, cached, "", **more)  # and its secret
        width = here.train.latents_NChw.flatten(1).shape[1]
        monkeypatch.setattr(memorised, "latents", lambda _, texts: torch.rand(len(texts), width))
        found = memorised.look("rose", folder, run_of(tmp_path, 5, **settings), tiny.models(), cached, 1000)
        return found, here

    return look


def test_private_counts_leave_to_two_digits_and_the_lists_are_no_longer(looked):
    """Of 250 photos 128, sixteen groups of eight, are held out, and 122 trained on: 120 of either are told."""
    found, here = looked(250)
    assert (len(here.photos), len(here.held_out.keys)) == (122, 128)
    assert (found.photos, len(found.samples), len(found.held_out)) == (120, 120, 120)
    assert found.held_out == tuple(sorted(found.held_out)) and found.samples == tuple(sorted(found.samples))


def test_with_a_promise_the_number_of_photos_is_the_one_that_the_site_says(looked, monkeypatch):
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=8 photos=10")
    found, here = looked(60)
    assert len(here.photos) > 10 and (found.photos, len(found.samples)) == (10, 10)


def test_no_distance_of_fewer_held_out_photos_than_the_floor_leaves(looked, monkeypatch):
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=8")
    monkeypatch.setattr(memorised, "numbers", None)  # before anything is measured
    with pytest.raises(BouquetError, match="WORTH-04") as refused:
        looked(14, validation_fraction=0.1)
    assert "fewer than 8 stays" in refused.value.found


def test_a_number_of_rows_that_tells_no_more_than_the_site_does():
    own = privacy.Privacy(bytes(32))
    assert [len(memorised.some(range(n), 1000, own, 5)) for n in (99, 100, 119, 187)] == [99, 100, 110, 180]
    assert len(memorised.some(range(187), 4, own, 5)) == 4
    assert sorted(memorised.some(range(187), 1000, privacy.PUBLIC, 5)) == list(range(187))
