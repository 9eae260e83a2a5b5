"""The sample pictures that grow while a run works: the rows, a run that goes on, and pictures that cannot be drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from app.adapter import sample
from app.hub.gallery import Gallery
from bouquet.report import pictures
from tests.kit import tiny
from tests.kit.memory import Federation, spoil_from

NOBODY = lambda *_: None  # noqa: E731


def rows(run) -> list[int]:
    with Image.open(run / "samples.png") as image:
        return [int(number) for number in image.text["rounds"].split()]


def pixels(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def test_the_sheet_is_the_one_of_the_same_adapters_drawn_at_once(tmp_path):
    adapters = {"base": None, "round 1": tiny.adapter(1), "round 2": tiny.adapter(2)}
    gallery = Gallery(tiny.base(), tiny.CONFIG, tmp_path, NOBODY)
    for number in (1, 2):
        gallery.draw(number, adapters[f"round {number}"])
    gallery.finish()
    assert rows(tmp_path) == [0, 1, 2]
    np.testing.assert_array_equal(
        pixels(tmp_path / "samples.png"), np.asarray(sample.sheet(tiny.base(), adapters, tiny.CONFIG))
    )


def test_the_report_knows_the_rounds_of_a_sheet_that_still_grows(tmp_path):
    gallery = Gallery(tiny.base(), tiny.CONFIG, tmp_path, NOBODY)
    gallery.draw(4, tiny.adapter(1))  # round 5 is written, and not drawn yet
    gallery.finish()
    shown = pictures.cut(tmp_path / "samples.png", vars(tiny.CONFIG), last=5)
    assert shown["rounds"] == [0, 4] and [prompt["text"] for prompt in shown["prompts"]] == list(tiny.CONFIG.prompts)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(3, [0, 1, 2, 3]), (16, list(range(17))), (32, list(range(0, 33, 2))), (34, [*range(0, 34, 3), 34])],
)
def test_a_long_run_has_a_row_for_every_so_many_rounds_and_for_the_last(tmp_path, monkeypatch, rounds, expected):
    monkeypatch.setattr(sample, "render", lambda *_: [Image.new("RGB", (8, 8))] * 2)
    gallery = Gallery(tiny.base(), tiny.config(rounds=rounds), tmp_path, NOBODY)
    for number in range(1, rounds + 1):
        gallery.draw(number, {})
    gallery.finish()
    assert rows(tmp_path) == expected


def test_every_row_is_told_once_and_in_order(tmp_path):
    told = []
    gallery = Gallery(
        tiny.base(),
        tiny.CONFIG,
        tmp_path,
        lambda number, prompts, images, file: told.append((number, len(images), file.name)),
    )
    gallery.draw(1, tiny.adapter(1))
    gallery.finish()
    gallery.tell()
    assert told == [(0, 2, "samples.png"), (1, 2, "samples.png")]


def test_without_prompts_nothing_is_drawn(tmp_path):
    gallery = Gallery(tiny.base(), tiny.config(sample_prompts=""), tmp_path, NOBODY)
    gallery.draw(1, tiny.adapter(1))
    gallery.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_goes_on_shows_the_rounds_before_it_too(tmp_path, monkeypatch):
    Federation(tmp_path / "one", rounds=1).go(monkeypatch)
    second = Federation(tmp_path / "two", rounds=2, resume="7")
    (tmp_path / "one" / "adapters" / "7").rename(second.adapters / "7")
    assert rows(second.go(monkeypatch, run_id=8)) == [0, 1, 2]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_pictures_that_cannot_be_drawn_never_fail_a_run(tmp_path, monkeypatch, capsys, when):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sample, "pipeline" if when == "at once" else "render", broken)
    federation = Federation(tmp_path)
    run = federation.go(monkeypatch)
    assert federation.history()["state"] == "finished" and not (run / "samples.png").exists()
    assert capsys.readouterr().out.count("no more sample pictures (RuntimeError)") == 1


def test_a_run_that_fails_leaves_the_pictures_it_has(tmp_path, monkeypatch):
    federation = Federation(tmp_path, rounds=3)
    federation.grid.tamper = spoil_from("3")
    federation.fails(monkeypatch, "HUB-02")
    assert rows(federation.adapters / "7")[:2] == [0, 1]
