"""Several resolutions in one run: who is shown at which, what is told of it, how much noise it gets, what it costs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from app import families, model
from app.config import RunConfig
from app.errors import ConfigError, SiteError
from app.families import flux, sdxl
from app.families.noise import Flow
from app.site import diffusion, train
from app.site.limits import Limits
from app.site.photos import views
from app.site.photos.views import Plan
from bouquet.site import estimate
from tests.kit import families as kit
from tests.kit import tiny
from tests.test_views import encode, wide_and_tall

SQUARES = tuple(((side, side),) for side in (16, 32, 64))


def read(**values) -> RunConfig:
    return RunConfig.read({key.replace("_", "-"): value for key, value in values.items()})


# --- what a run may ask


def test_the_sides_are_in_order_and_resolution_is_one_of_them():
    assert RunConfig().sides == (64,)
    assert read(resolution=512, resolutions="768, 512,1024").sides == (512, 768, 1024)
    with pytest.raises(ConfigError, match="CONFIG-02") as error:
        read(resolutions="512,768")  # resolution is 64
    assert "resolution = 64" in error.value.found and "one of resolutions (512,768)" in error.value.fix


@pytest.mark.parametrize("wrong", ["512,", "512,512", "512;768", "500", "8", "4096", "1e3", "x", "-64", "٦٤"])
def test_sides_that_are_none_are_refused(wrong):
    with pytest.raises(ConfigError, match="CONFIG-02") as error:
        read(resolution=64, resolutions=wrong)
    assert "resolutions = " in error.value.found


def test_every_side_has_to_suit_the_family():
    flux.FAMILY.check_run(RunConfig(resolution=64, resolutions="64,128", lora_targets="attention"))
    with pytest.raises(ConfigError, match="CONFIG-05") as error:
        flux.FAMILY.check_run(RunConfig(resolution=64, resolutions="64,72", lora_targets="attention"))
    assert "resolution = 72" in error.value.found


def test_a_sites_limits_are_about_the_largest_side_and_the_smallest():
    run = RunConfig(resolution=512, resolutions="256,512,1024")
    Limits.read("max-resolution=1024 min-resolution=256").check(run)
    for limit in ("max-resolution=768", "min-resolution=512"):
        with pytest.raises(SiteError, match="TRUST-03"):
            Limits.read(limit).check(run)


def test_a_round_of_private_photos_needs_as_many_passes_as_photos_at_every_side():
    """16 passes are led by 16 of the pairs of a photo and one of two sides, which are of 8 photos at least."""
    rules, run = Limits().private(), {"resolution": 64, "resolutions": "32,64"}
    rules.check_photos(RunConfig(local_steps=16, **run), trained=100, held_out=8)
    with pytest.raises(SiteError, match="TRUST-03"):
        rules.check_photos(RunConfig(local_steps=15, **run), trained=100, held_out=8)


# --- who is shown at which


def test_a_photo_is_shown_at_each_side_that_it_is_large_enough_for_and_at_the_smallest_in_any_case():
    sizes = {"large": (100, 70), "middle": (63, 80), "small": (20, 30), "tiny": (9, 9), "held": (100, 100)}
    plan = Plan(SQUARES[1], trained=frozenset(sizes) - {"held"}, sides=SQUARES)
    found = {key: [view.height for view in some] for key, some in plan.views(list(sizes), sizes.get).items()}
    assert found == {"large": [16, 32, 64], "middle": [16, 32], "small": [16], "tiny": [16], "held": [32]}


def test_a_side_of_fewer_photos_than_a_step_must_have_is_left_out():
    sizes = {"a": (100, 100), "b": (100, 100), "c": (40, 40)}
    plan = Plan(SQUARES[0], trained=frozenset(sizes), sides=SQUARES, least=3)
    assert Counter(view.height for some in plan.views(list(sizes), sizes.get).values() for view in some) == {
        16: 3,
        32: 3,
    }


def test_shapes_crops_and_mirror_images_are_each_sides_own():
    run = RunConfig(resolution=64, resolutions="32,64", aspect_buckets=True, random_crops=2, flip=True)
    plan = Plan.of(run, 8, frozenset({"wide"}))
    found = plan.views(["wide"], lambda key: (500, 200))["wide"]
    assert [view.shape for view in found] == [(24, 48)] * 4 + [(48, 88)] * 4
    assert all(shape in plan.sides[number] for number, shape in enumerate(((24, 48), (48, 88))))
    assert [(view.crop, view.mirrored) for view in found] == 2 * [(1, False), (1, True), (2, False), (2, True)]
    assert views.largest(run, 8) == views.largest(RunConfig(resolution=64, aspect_buckets=True), 8)


def test_each_photo_is_an_entry_a_side_with_the_sizes_that_sdxl_is_told(tmp_path):
    folder = wide_and_tall(tmp_path / "data", [(100, 40), (24, 24)])
    plan = Plan(SQUARES[1], trained=frozenset(p.key for p in train.data.scan(folder).photos), sides=SQUARES[:2])
    partition, found = encode(folder, tmp_path / "cache", plan)
    wide, small = (photo.key for photo in partition.photos)
    assert found.keys == [wide, wide, small] and found.bounds is None and partition.enlarged == 0
    assert [tuple(z.shape) for z in found.latents] == [(4, 8, 8), (4, 16, 16), (4, 8, 8)]
    # 40 of 100 columns from the 30th on; scaled to 16 rows that is the 12th, to 32 the 24th
    assert found.sizes_R6.tolist() == [[40, 100, 0, 12, 16, 16], [40, 100, 0, 24, 32, 32], [24, 24, 0, 0, 16, 16]]
    assert [bucket.tolist() for bucket in found.buckets] == [[0, 2], [1]]
    assert found.text_N.tolist() == [1, 1, 2]


def test_what_sdxl_hears_of_a_batch_is_its_own_resolution():
    heard = []

    def net(noisy, told, text, added_cond_kwargs):
        heard.append(added_cond_kwargs["time_ids"].tolist())
        return type("Out", (), {"sample": noisy})

    given = {
        "text": torch.zeros(1, 2, 3),
        "pooled": torch.zeros(1, 3),
        "size": torch.tensor([[40, 100, 0, 24, 32, 32]]),
    }
    sdxl.FAMILY.predict(net, torch.zeros(1, 4, 4, 4), torch.zeros(1), given)
    assert heard == [[[40, 100, 0, 24, 32, 32]]]


# --- how much noise


def flow_of(name: str) -> Flow:
    schedule = families.of(kit.base(name)).schedule(kit.base(name))
    assert isinstance(schedule, Flow)
    return schedule


def test_flux_gets_at_each_side_the_shift_that_its_pipeline_has_more_for_it():
    """512² is 1024 tokens, 1024² is 4096: mu is 0.5 + 0.65 · 768/3840 = 0.63, and 1.15."""
    flow = flow_of("flux")
    assert flow.slope == pytest.approx(0.65 / 3840) and flow.shift == 1.0
    half = flow.at(1024, 4096)
    assert (
        half.shift
        == pytest.approx(math.exp(0.63 - 1.15))
        == pytest.approx(math.exp(calculate_shift(1024) - calculate_shift(4096)))
    )
    # the middle level: 0.5945 · 0.5 / (1 - 0.4055 · 0.5) = 0.3729 noise
    us = torch.arange(1000) / 1000 + 5e-4
    drawn = (us / (half.shift - (half.shift - 1) * us) * 1000).long()
    assert float(flow.sigmas_K[drawn[499]]) == pytest.approx(0.3729, abs=2e-3)


def test_the_levels_of_a_side_are_those_of_the_usual_one_shifted_once_more_as_diffusers_shifts():
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = flow_of("flux")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    usual, larger = flow.draw(500, one), flow.at(4096, 1024).draw(500, other)
    sigma = flow.sigmas_K[usual]
    as_drawn = [scheduler.time_shift(mu, 1.0, sigma) for mu in (calculate_shift(4096), calculate_shift(1024))]
    back = scheduler.time_shift(calculate_shift(1024), 1.0, flow.sigmas_K[larger])  # the pipeline's at the usual side
    torch.testing.assert_close(back, as_drawn[0], atol=3e-3, rtol=0)
    assert (back >= as_drawn[1]).all()  # a larger picture gets more noise
    assert torch.equal(flow.at(1024, 1024).draw(500, torch.Generator().manual_seed(3)), usual)


@pytest.mark.parametrize("name", ["sd3", "zimage", "sdxl", "sd"])
def test_families_whose_pipelines_do_not_shift_by_the_size_have_the_same_levels_at_every_side(name):
    schedule = families.of(kit.base(name)).schedule(kit.base(name))
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(schedule.draw(99, one), schedule.at(256, 4096).draw(99, other))


def test_a_batch_is_asked_at_its_own_size():
    objective = diffusion.Objective.of(kit.base("flux"))
    at = objective.at(torch.tensor([[40, 100, 0, 24, 512, 256]]), 1024)
    assert isinstance(at.schedule, Flow)
    assert at.schedule.shift == pytest.approx(math.exp(0.65 / 3840 * (512 * 256 / 256 - 4096)))


# --- a site


def test_a_site_trains_at_two_sides_validates_at_one_and_a_round_again_is_the_same(tmp_path):
    folder = wide_and_tall(tmp_path / "data", [(40, 40)] * 9 + [(20, 20)] * 3)
    run = tiny.config(resolution=16, resolutions="16,32", local_steps=6)

    def site() -> train.Site:
        found = train.Site(run, tiny.models(), folder, tmp_path / "cache", "", secret=train.privacy.Secret.NONE)
        found.fit(seed=4)
        return found

    first, again = site(), site()
    both = sum(photo.load()[16:24] == (40).to_bytes(4) * 2 for photo in first.photos)  # PNG's width and height
    assert 0 < both < len(first.photos)
    assert [len(bucket) for bucket in first.train.buckets] == [len(first.photos), both]
    assert first.held_out.latents_NChw.shape[2:] == (8, 8) and len(first.held_out.keys) == 12 - len(first.photos)
    assert 0 < first.evaluate() == again.evaluate()
    assert tiny.equal(model.adapter_of(first.net), model.adapter_of(again.net))
    plain = train.Site(
        tiny.config(resolution=16, local_steps=6), tiny.models(), folder, tmp_path / "cache", "",
        secret=train.privacy.Secret.NONE,
    )  # fmt: skip
    assert (
        plain.evaluate()
        == train.Site(run, tiny.models(), folder, tmp_path / "cache", "", secret=train.privacy.Secret.NONE).evaluate()
    )  # the same photos, at the same resolution


@pytest.mark.parametrize("prior", [False, True])
def test_the_loop_draws_each_batchs_levels_by_that_batchs_size(monkeypatch, prior):
    """By the size that an entry says, of the photos and of the class images alike."""
    from app.site import cache

    asked = []
    monkeypatch.setattr(
        diffusion.Objective, "at", lambda self, sizes, side: asked.append((sizes[0, 4].item(), side)) or self
    )
    z, text = tiny.batch(4)
    sizes = torch.tensor([[64, 64, 0, 0, 16, 16]] * 4)
    photos = cache.Encoded(z, [{"text": row} for row in text], torch.arange(4), sizes, list("abcd"))
    for run, expected in (("16,32", [(16, 16)] * (4 if prior else 2)), ("", [])):
        asked.clear()
        config = tiny.config(local_steps=2, resolutions=run, prior_loss_weight=float(prior))
        train.fit(
            tiny.unet(config), diffusion.Objective.of(tiny.base()), photos, config, train.accelerator(config), 1, 1,
            photos if prior else None,
        )  # fmt: skip
        assert asked == expected


@pytest.mark.slow
def test_the_estimate_is_of_the_largest_side_and_counts_what_is_kept_of_each():
    of = lambda on_gpu, **more: estimate.estimate(tiny.base(), tiny.config(**more), half=False, on_gpu=on_gpu, photos=9)  # noqa: E731
    several = {"resolution": 16, "resolutions": "16,32"}
    assert of(True, **several) == of(True, resolution=32)
    more = of(False, **several).floor - of(False, resolution=32).floor
    assert more == 9 * 4 * 4 * 8 * 8  # one more of each photo: float32 latents of 16² pixels
