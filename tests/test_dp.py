"""DP-SGD's steps: each photo's own gradient, its length, noise and draws, against plain PyTorch and statistics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from app import families, model
from app.config import RunConfig
from app.families.base import Conditions, Family
from app.site import cache, diffusion, dp, optimisers, train
from app.site.accountant import Terms
from tests.kit import families as kit
from tests.kit import tiny

NOBODY = Terms(photos=4 * 10**12, images=4, noise=1.0, clip=0.5)  # a chance of 1e-12: steps without any photo
ONE_STEP = {"local_steps": 1, "caption_dropout": 0.0, "learning_rate": 1.0}


def rows(name: str, family: Family, count: int) -> cache.Encoded:
    """Of noise, in the shapes in which a site encodes photos for that family's tiny base model."""
    draw, own = torch.Generator().manual_seed(3), family.settings(kit.base(name))
    shape = (16, 8, 8) if name == "flux2" else (4, 16, 16)

    def words(tokens: int) -> Conditions:
        shapes = family.shapes(own, tokens)
        return {key: torch.randn(of, generator=draw) for key, of in shapes.items() if key not in ("size", "mask")}

    longest = family.tokens(kit.base(name)) if family.net == "unet" else 6
    shorter = 3 if name in ("zimage", "qwen-image") else 1  # those whose nets are told how long a text is
    texts = [words(longest - number % shorter) for number in range(count + 1)]
    sizes = torch.tensor([[kit.SIDE, kit.SIDE, 0, 0, kit.SIDE, kit.SIDE]] * count)
    latents = torch.randn(count, *shape, generator=draw)
    return cache.Encoded(latents, texts, torch.arange(count) + 1, sizes, [f"photo {n}" for n in range(count)])


def photos(count: int = 6) -> cache.Encoded:
    latents, text = tiny.batch(count)
    return cache.Encoded.of(latents, text, torch.full((24, 16), 9.0), [f"photo {n}" for n in range(count)])


def trained_by(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def flat(parts) -> torch.Tensor:
    return torch.cat([part.detach().flatten().double() for part in parts])


@pytest.fixture
def plain(monkeypatch):
    """A step is the gradient, times a learning rate of 1: a test reads it off the adapter."""
    monkeypatch.setattr(optimisers, "of", lambda config, trained, device: torch.optim.SGD(trained, lr=1.0))


def step(net, terms: Terms, config: RunConfig, encoded: cache.Encoded, base=None) -> torch.Tensor:
    """The gradient that a step without an optimiser takes."""
    before, objective = flat(trained_by(net)), diffusion.Objective.of(base or tiny.base())
    dp.fit(net, objective, encoded, config, train.accelerator(config), terms)
    return before - flat(trained_by(net))


# --- each photo's gradient
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kit.ALL)
def test_in_every_family_a_step_is_the_sum_of_each_photos_own_gradient_cut_to_the_clip(name, plain, monkeypatch):
    """The reference: the loss of each photo in one batch of all, and autograd's gradient of it."""
    base, count = kit.base(name), 4
    family, objective = families.of(base), diffusion.Objective.of(base)
    encoded, draw = rows(name, family, count), torch.Generator().manual_seed(5)
    noise, t = torch.randn(encoded.latents.shape, generator=draw), objective.schedule.draw(count, draw)

    def loss(net, objective, latents, given, generator, **how):
        (number,) = (n for n in range(count) if torch.equal(encoded.latents[n], latents[0]))
        return diffusion.losses(net, objective, latents, given, noise[number, None], t[number, None]).mean()

    monkeypatch.setattr(diffusion, "noise_loss", loss)
    for targets in family.targets:
        settings = {key.replace("_", "-"): value for key, value in kit.SETTINGS.items()}
        config = replace(RunConfig.read(tiny.RUN | settings | {"lora-targets": targets}), **ONE_STEP)
        net = model.load_net(base)
        model.add_adapter(net, family, config)
        for p in trained_by(net):
            p.data += 0.05 * torch.randn(p.shape, generator=draw)
        each = diffusion.losses(net, objective, *encoded.batch(torch.arange(count)), noise, t)
        ask = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        own = [flat(torch.autograd.grad(each[n], trained_by(net), **ask)) for n in range(count)]
        clip = sorted(part.norm().item() for part in own)[1] * 1.001  # two are shorter, two are cut
        expected = sum(part * min(1.0, clip / part.norm().item()) for part in own) / count
        got = step(net, Terms(photos=count, images=count, noise=0.0, clip=clip), config, encoded, base)
        assert (got - expected).norm() < 1e-4 * expected.norm(), targets


def test_a_photos_gradient_is_cut_over_all_of_the_adapter_together():
    sums = [torch.zeros(1), torch.zeros(1, 1), torch.zeros(2)]
    dp.add_clipped(sums, [torch.tensor([3.0]), torch.tensor([[4.0]]), None], clip=1.0)  # of length 5
    assert [part.tolist() for part in sums] == [[pytest.approx(0.6)], [[pytest.approx(0.8)]], [0.0, 0.0]]
    dp.add_clipped(sums, [torch.tensor([0.3]), torch.tensor([[0.4]]), None], clip=1.0)  # a shorter one stays as it is
    assert [part.tolist() for part in sums] == [[pytest.approx(0.9)], [[pytest.approx(1.2)]], [0.0, 0.0]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e30])
def test_a_gradient_whose_length_is_no_number_counts_as_none(broken):
    sums = [torch.zeros(2)]
    dp.add_clipped(sums, [torch.tensor([broken, 0.0])], clip=1.0)
    assert sums[0].tolist() == [0.0, 0.0]  # the square of 1e30 is none in float32


def test_in_bf16_lengths_and_sums_are_of_float32(plain, monkeypatch):
    config, seen, add = tiny.config(precision="bf16", **ONE_STEP), [], dp.add_clipped

    def look(sums, gradients, clip):
        seen.extend(part.dtype for part in [*sums, *gradients])
        add(sums, gradients, clip)

    monkeypatch.setattr(dp, "add_clipped", look)
    AcceleratorState._reset_state(True)
    try:
        got = step(tiny.unet(config), Terms(6, 6, 0.0, 0.01), config, photos())
    finally:
        AcceleratorState._reset_state(True)
    assert set(seen) == {torch.float32} and 0 < got.norm() <= 0.01 * 1.0001


@pytest.mark.parametrize("changes", [
    {"aspect_buckets": True}, {"min_snr_gamma": 5.0, "noise_offset": 0.1}, {"gradient_checkpointing": True},
    {"base_precision": "int8"}, {"proximal_mu": 1.0}, {"optimizer": "adafactor"},
])  # fmt: skip
def test_what_else_a_run_may_ask_for_trains_under_noise_too(changes):
    config = tiny.config(**changes)
    objective, net = train.load(tiny.base(), config, train.accelerator(config))
    encoded, before = photos(), flat(trained_by(net))
    if config.aspect_buckets:  # a pass of photos of several shapes
        odd = [torch.randn(4, 4, 16) if n % 2 else row for n, row in enumerate(encoded.latents)]
        encoded = replace(encoded, latents=odd)
    loss = dp.fit(net, objective, encoded, config, train.accelerator(config), Terms(6, 4, 0.1, 0.1))
    after = flat(trained_by(net))
    assert math.isfinite(loss) and after.isfinite().all() and not torch.equal(before, after)


# --- noise and draws
# ---------------------------------------------------------------------------------------------------------


def test_a_step_without_any_photo_is_noise_of_the_multiplier_times_the_clip_over_the_expected_images(plain):
    config = tiny.config(lora_rank=16, **ONE_STEP)
    noise = step(tiny.unet(config), NOBODY, config, photos())
    expected, count = 1.0 * 0.5 / 4, len(noise)
    assert count > 10_000
    assert abs(noise.mean()) < 5 * expected / math.sqrt(count)
    assert noise.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
    for width, share in ((1, 0.6827), (2, 0.9545)):  # a normal's
        within = (noise.abs() < width * expected).double().mean().item()
        assert within == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / count))


def test_the_sum_is_divided_by_the_images_expected_and_not_by_those_that_came(plain, monkeypatch):
    config = tiny.config(**ONE_STEP)
    monkeypatch.setattr(dp, "drawn", lambda count, rate: [0])
    one = step(tiny.unet(config), Terms(photos=6, images=2, noise=0.0, clip=1e-4), config, photos())
    assert one.norm().item() == pytest.approx(1e-4 / 2, rel=1e-3)


def test_a_photo_is_in_a_step_with_its_chance_whatever_the_others_are():
    draws = torch.zeros(400, 500)
    for row in draws:
        row[dp.drawn(500, 0.1)] = 1
    assert draws.mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / draws.numel()))
    sizes = draws.sum(dim=1)  # of Poisson's draws a step's size varies as a binomial's
    assert sizes.var().item() == pytest.approx(500 * 0.09, rel=5 * math.sqrt(2 / 400))
    assert dp.drawn(500, 1.0) == list(range(500)) and dp.drawn(500, 1e-12) == []


def test_nobody_who_knows_the_seed_can_repeat_a_draw_or_the_noise():
    def once() -> torch.Tensor:
        torch.manual_seed(1)
        net = tiny.unet()
        dp.fit(net, diffusion.Objective.of(tiny.base()), photos(), tiny.CONFIG, train.accelerator(tiny.CONFIG), NOBODY)
        return flat(trained_by(net))

    assert not torch.equal(once(), once())


def test_a_round_without_any_photo_has_no_loss_of_its_own(plain):
    net, config = tiny.unet(), tiny.config(**ONE_STEP)
    objective = diffusion.Objective.of(tiny.base())
    assert math.isnan(dp.fit(net, objective, photos(), config, train.accelerator(config), NOBODY))


@pytest.mark.slow
def test_little_noise_and_a_wide_clip_learn_the_photos():
    config = tiny.config(local_steps=20, learning_rate=0.03, caption_dropout=0.0)
    net, encoded, objective = tiny.unet(config), photos(4), diffusion.Objective.of(tiny.base())
    how = {"timesteps": 8, "batch_size": 32}
    before = diffusion.validation_loss(net, objective, encoded, torch.device("cpu"), **how)
    dp.fit(net, objective, encoded, config, train.accelerator(config), Terms(4, 4, 1e-3, 1.0))
    assert diffusion.validation_loss(net, objective, encoded, torch.device("cpu"), **how) < 0.95 * before


def test_the_rate_follows_the_whole_runs_schedule_as_without_noise(monkeypatch):
    seen, own = [], optimisers.of

    def of(config, trained, device):
        optimiser = own(config, trained, device)
        optimiser.register_step_pre_hook(lambda one, *_: seen.append(one.param_groups[0]["lr"]))
        return optimiser

    monkeypatch.setattr(optimisers, "of", of)
    config = tiny.config(learning_rate=0.01, learning_rate_schedule="linear", rounds=2, local_steps=3)
    objective, one = diffusion.Objective.of(tiny.base()), train.accelerator(config)
    dp.fit(tiny.unet(config), objective, photos(), config, one, NOBODY, number=2)
    assert seen == pytest.approx([0.01 * (6 - step) / 6 for step in (3, 4, 5)])
