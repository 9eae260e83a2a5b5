"""Before/after pictures: fair comparisons, on a sheet of known size."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageFont

from app import model
from app.adapter import sample
from tests.kit import tiny
from tests.kit.memory import Federation

PROMPTS = ["a red poppy, meadow background", "a white lily, night background"]


@pytest.fixture(scope="module")
def pipe():
    return sample.pipeline(tiny.base(), tiny.CONFIG, torch.device("cpu"))


def pixels(images: list[Image.Image]) -> np.ndarray:
    """int [N, H, W, 3]."""
    return np.stack([np.asarray(image, dtype=int) for image in images])


def test_one_picture_a_prompt_at_the_runs_resolution(pipe):
    images = sample.render(pipe, None, PROMPTS, tiny.CONFIG)
    assert [(image.size, image.mode) for image in images] == [((16, 16), "RGB")] * 2


def test_the_same_seed_draws_the_same_picture(pipe):
    one, two = (pixels(sample.render(pipe, tiny.adapter(1), PROMPTS, tiny.CONFIG)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_another_seed_draws_another_picture(pipe):
    one, two = (pixels(sample.render(pipe, None, PROMPTS, tiny.CONFIG, seed=seed)) for seed in (1, 2))
    assert np.abs(one - two).max() > 10


def test_without_an_adapter_it_is_the_base_models_own_picture(pipe):
    stock = StableDiffusionPipeline.from_pretrained(tiny.base(), safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(42), torch.Generator().manual_seed(43)]
    expected = stock(
        PROMPTS, height=16, width=16, num_inference_steps=2, guidance_scale=tiny.CONFIG.sample_guidance, generator=seeds
    ).images
    np.testing.assert_array_equal(pixels(sample.render(pipe, None, PROMPTS, tiny.CONFIG)), pixels(expected))


def test_a_fresh_adapter_draws_like_the_base(pipe):
    base, fresh = (pixels(sample.render(pipe, adapter, PROMPTS, tiny.CONFIG)) for adapter in (None, tiny.fresh()))
    np.testing.assert_array_equal(base, fresh)


def test_the_base_is_the_base_also_after_an_adapter_was_drawn(pipe):
    before = pixels(sample.render(pipe, None, PROMPTS, tiny.CONFIG))
    changed = pixels(sample.render(pipe, tiny.adapter(1), PROMPTS, tiny.CONFIG))
    after = pixels(sample.render(pipe, None, PROMPTS, tiny.CONFIG))
    np.testing.assert_array_equal(before, after)
    assert np.abs(changed - before).max() > 10


def test_picture_i_starts_from_seed_plus_i_whatever_stands_beside_it(pipe):
    together = pixels(sample.render(pipe, None, PROMPTS, tiny.CONFIG, seed=5))
    second = pixels(sample.render(pipe, None, PROMPTS[1:], tiny.CONFIG, seed=6))
    assert np.abs(together[1] - second[0]).max() <= 1  # of 255: a batch of another size rounds differently


def test_a_grids_size_and_places_by_hand():
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    sheet = sample.grid([[red, blue, red], [blue, red, blue]], ["", ""], ["", "", ""], cell=10)
    # left margin 12 without names, a cell and a gap of 6 for each of 3 columns; top margin 10 and one line of 17
    assert sheet.size == (12 + 3 * 16, 27 + 2 * 16)
    for row, column, colour in ((0, 0, (255, 0, 0)), (0, 1, (0, 0, 255)), (1, 0, (0, 0, 255)), (1, 2, (0, 0, 255))):
        left, top = 12 + 16 * column, 27 + 16 * row
        assert sheet.getpixel((left, top)) == sheet.getpixel((left + 9, top + 9)) == colour
        assert sheet.getpixel((left + 10, top)) == sheet.getpixel((left, top + 10)) == (255, 255, 255)


def test_names_get_room_and_a_comma_breaks_the_line():
    picture = Image.new("RGB", (4, 4))
    sheet = sample.grid([[picture]], ["round 1"], ["a red poppy, meadow background"], cell=128)
    name = int(ImageFont.load_default(12).getlength("round 1"))
    assert sheet.size == (12 + name + 134, 10 + 2 * 17 + 134)


def test_a_sheet_has_a_row_an_adapter_and_a_column_a_prompt():
    sheet = sample.sheet(tiny.base(), {"base": None, "round 1": tiny.adapter(1)}, tiny.CONFIG)
    name = int(max(ImageFont.load_default(12).getlength(text) for text in ("base", "round 1")))
    assert sheet.size == (12 + name + 2 * 134, 10 + 2 * 17 + 2 * 134)
    cells = [sheet.crop((12 + name, top, 12 + name + 128, top + 128)) for top in (44, 44 + 134)]
    assert np.abs(np.asarray(cells[0], dtype=int) - np.asarray(cells[1], dtype=int)).max() > 10


def test_drawing_leaves_the_adapters_as_they_are(pipe):
    adapter = tiny.adapter(1)
    sample.render(pipe, adapter, PROMPTS, tiny.CONFIG)
    assert model.adapter_hash(adapter) == model.adapter_hash(tiny.adapter(1))


# diffusers 0.42's with numpy 2, where it makes sigmas
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize(
    ("own", "drawn"),
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True}, "DPMSolverMultistepScheduler"),
    ],
)
def test_a_base_whose_scheduler_needs_scipy_is_drawn_by_the_nearest_that_does_not_and_it_is_said(
    own, drawn, tmp_path, capsys
):
    """LMS of the first order is Euler's method; scipy is not among the packages."""
    base = shutil.copytree(tiny.base(), tmp_path / "lms")
    for name, change in (
        ("scheduler/scheduler_config.json", own),
        ("model_index.json", {"scheduler": ["diffusers", own["_class_name"]]}),
    ):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
    [picture] = sample.render(sample.plain(base, torch.device("cpu")), None, PROMPTS[:1], tiny.CONFIG)
    told = capsys.readouterr().out
    assert (
        told.startswith(f"bouquet: without scipy, {own['_class_name']}")
        and f"{drawn} with its usual steps does" in told
    )
    euler = sample.plain(tiny.base(), torch.device("cpu"))
    euler.scheduler = getattr(diffusers, drawn).from_config(euler.scheduler.config)
    np.testing.assert_array_equal(pixels([picture]), pixels(sample.render(euler, None, PROMPTS[:1], tiny.CONFIG)))


# --- on which device the hub draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "gpus", "drawn_on"),
    [
        ("", 0, "cpu"), ("auto", 0, "cpu"), ("", 1, "cuda"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1"),
    ],
)  # fmt: skip
def test_the_hubs_operator_says_on_which_device_pictures_are_drawn(monkeypatch, setting, gpus, drawn_on):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert sample.device(setting) == torch.device(drawn_on)


@pytest.mark.parametrize(
    ("setting", "gpus", "code"),
    [("cuda", 0, "GPU-02"), ("cuda:2", 2, "GPU-02"), ("gpu", 1, "HOST-15"), ("cuda:", 1, "HOST-15")],
)
def test_a_device_that_is_not_there_or_none_is_refused_before_the_run_begins(
    monkeypatch, tmp_path, setting, gpus, code
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("HUB_DEVICE", setting)
    federation = Federation(tmp_path)
    assert f"HUB_DEVICE={setting}" in federation.fails(monkeypatch, code).found
    assert federation.grid.sent == []


@pytest.mark.slow
def test_the_hubs_pictures_are_drawn_on_the_device_that_was_asked_for(monkeypatch, tmp_path):
    """On a GPU's machine too: its pipeline is told the device, and nothing is left to what torch sees."""
    asked = []
    real = sample.pipeline
    monkeypatch.setattr(sample, "pipeline", lambda base, config, on=None: asked.append(on) or real(base, config, on))
    monkeypatch.setenv("HUB_DEVICE", "cpu")
    Federation(tmp_path).go(monkeypatch)
    assert asked == [torch.device("cpu")]
