"""The loss, against the formulas worked out by hand, and a validation that measures the adapter and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from app import model
from app.errors import ConfigError
from app.families import sd
from app.families.noise import Betas
from app.site import diffusion
from app.site.cache import Encoded
from tests.kit import tiny

KEYS = ["rose", "lily", "lotus", "thistle", "poppy"]


def schedule(prediction_type: str = "epsilon") -> diffusion.Objective:
    """Stable Diffusion's noise schedule, and how its UNet is asked."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    return diffusion.Objective(sd.FAMILY, Betas(scheduler))


def alpha_bar() -> np.ndarray:
    """The share of signal left at each timestep, from the schedule's definition."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class Silent:
    """A UNet that predicts zero everywhere, and keeps what it was asked."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.noisy, self.timesteps = [], []

    def __call__(self, noisy, timesteps, text):
        self.noisy.append(noisy)
        self.timesteps.append(timesteps)
        return SimpleNamespace(sample=torch.zeros_like(noisy))


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the training loss
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_mean_squared_error_of_the_prediction_as_in_the_paper(kind):
    latents, text = tiny.batch(3)
    loss = diffusion.noise_loss(unet := tiny.unet(), schedule(kind), latents, {"text": text}, generator())

    draw = generator()
    noise, t = torch.randn(latents.shape, generator=draw), torch.randint(1000, (3,), generator=draw)
    signal = torch.tensor(alpha_bar()[t] ** 0.5, dtype=torch.float32).view(3, 1, 1, 1)
    spread = (1 - signal**2) ** 0.5
    target = noise if kind == "epsilon" else signal * noise - spread * latents
    predicted = unet(signal * latents + spread * noise, t, text).sample
    assert loss.item() == pytest.approx((predicted - target).square().mean().item(), rel=1e-4)
    assert loss.dtype == torch.float32 and loss.shape == ()


def test_losses_are_one_number_an_image_worked_out_by_hand():
    # Nothing predicted, signal 1, noise 2: epsilon leaves 2² = 4; v leaves (2·√ᾱ − √(1−ᾱ))².
    latents, noise, t = torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0), torch.tensor([0, 999])
    text = torch.zeros(2, 24, 16)
    assert diffusion.losses(Silent(), schedule(), latents, {"text": text}, noise, t).tolist() == [4.0, 4.0]
    a = alpha_bar()[[0, 999]]
    by_hand = (2 * a**0.5 - (1 - a) ** 0.5) ** 2
    assert diffusion.losses(
        Silent(), schedule("v_prediction"), latents, {"text": text}, noise, t
    ).tolist() == pytest.approx(by_hand.tolist(), rel=1e-4)


def test_the_unet_sees_the_image_at_the_start_and_the_noise_at_the_end_of_the_schedule():
    silent, latents, noise = Silent(), torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)
    diffusion.losses(silent, schedule(), latents, {"text": torch.zeros(2, 24, 16)}, noise, torch.tensor([0, 999]))
    # √0.99915 + 2·√0.00085 = 1.0579;  √0.00466 + 2·√0.99534 = 2.0636
    assert silent.noisy[0][:, 0, 0, 0].tolist() == pytest.approx([1.0579, 2.0636], abs=1e-4)


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_a_model_that_predicts_anything_else_is_refused(kind):
    scheduler = schedule("sample")
    scheduler.schedule.scheduler.register_to_config(prediction_type=kind)  # type: ignore[attr-defined]
    latents, text = tiny.batch(1)
    with pytest.raises(ConfigError, match="CONFIG-03") as caught:
        diffusion.noise_loss(Silent(), scheduler, latents, {"text": text}, generator())
    assert kind in caught.value.found


def test_min_snr_weights_by_hand():
    # ᾱ(0) = 0.99915, SNR 1175.47: clipped to 5. ᾱ(999) = 0.0046601, SNR 0.0046819: not clipped.
    t = torch.tensor([0, 999])
    assert schedule().schedule.weight(t, 5.0).tolist() == pytest.approx([5 / 1175.47, 1.0], rel=1e-3)
    weights = schedule("v_prediction").schedule.weight(t, 5.0).tolist()
    assert weights == pytest.approx([5 / 1176.47, 0.0046601], rel=1e-3)


def test_min_snr_weighs_each_image_by_its_own_timestep():
    latents, text = tiny.batch(4)
    draw = generator()
    noise, t = torch.randn(latents.shape, generator=draw), torch.randint(1000, (4,), generator=draw)
    snr = alpha_bar()[t] / (1 - alpha_bar()[t])
    by_hand = (noise.square().mean(dim=(1, 2, 3)).numpy() * np.minimum(snr, 5) / snr).mean()
    loss = diffusion.noise_loss(Silent(), schedule(), latents, {"text": text}, generator(), min_snr_gamma=5.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-3)


def test_the_offset_adds_one_number_a_channel_to_the_noise_and_to_what_is_to_be_predicted():
    latents, text = tiny.batch(3)
    silent, draw = Silent(), generator()
    loss = diffusion.noise_loss(silent, schedule(), latents, {"text": text}, generator(), noise_offset=0.5)
    noise = torch.randn(latents.shape, generator=draw) + 0.5 * torch.randn(3, 4, 1, 1, generator=draw)
    t = torch.randint(1000, (3,), generator=draw)
    signal = torch.tensor(alpha_bar()[t] ** 0.5, dtype=torch.float32).view(3, 1, 1, 1)
    torch.testing.assert_close(silent.noisy[0], signal * latents + (1 - signal**2) ** 0.5 * noise, rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-5)


def test_a_bf16_unet_is_asked_in_bf16_and_answers_a_float32_loss():
    latents, text = tiny.batch(2)
    exact = diffusion.noise_loss(tiny.unet(), schedule(), latents, {"text": text}, generator())
    rough = diffusion.noise_loss(tiny.unet(dtype=torch.bfloat16), schedule(), latents, {"text": text}, generator())
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.02)


# --- the validation loss
# -----------------------------------------------------------------------------------------------


def validate(unet, keys=KEYS, pick=slice(None), batch_size=4, timesteps=3) -> float:
    latents, text = tiny.batch(len(KEYS))
    photos = Encoded.of(latents[pick], text[pick], text[0], keys[pick])
    return diffusion.validation_loss(
        unet, schedule(), photos, torch.device("cpu"), timesteps=timesteps, batch_size=batch_size
    )


def test_validation_repeats_bit_for_bit_whatever_else_drew_random_numbers():
    unet = tiny.unet()
    first = validate(unet)
    torch.manual_seed(1234)
    torch.rand(17)
    assert validate(unet) == first


def test_validation_does_not_draw_from_the_processes_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    validate(Silent())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_validation_does_not_depend_on_the_batch_size(batch_size):
    unet = tiny.unet()
    assert validate(unet, batch_size=batch_size) == pytest.approx(validate(unet), rel=1e-5)


def test_an_images_loss_does_not_depend_on_the_other_images():
    unet = tiny.unet()
    alone = [validate(unet, pick=slice(n, n + 1)) for n in range(len(KEYS))]
    assert validate(unet) == pytest.approx(np.mean(alone), rel=1e-5)


def test_validation_changes_when_the_adapter_changes():
    unet = tiny.unet()
    before = validate(unet)
    model.apply_adapter(unet, tiny.adapter(1))
    assert abs(validate(unet) - before) > 1e-3


def test_another_image_gets_other_noise():
    assert validate(Silent(), keys=["rose"] * 5) != pytest.approx(validate(Silent()), rel=1e-4)


def test_each_image_is_seen_once_in_each_equal_part_of_the_schedule():
    silent = Silent()
    validate(silent, timesteps=4, batch_size=4)  # so that a batch is one image
    assert len(silent.timesteps) == len(KEYS)
    for t in silent.timesteps:
        assert [int(at) // 250 for at in t] == [0, 1, 2, 3]
    assert len({tuple(t.tolist()) for t in silent.timesteps}) == len(KEYS)


def test_a_silent_unets_validation_is_the_noises_own_variance():
    # 5 images × 4 timesteps × 256 numbers: mean of squares 1 ± 4·√(2/5120)
    assert validate(Silent(), timesteps=4) == pytest.approx(1.0, abs=4 * (2 / 5120) ** 0.5)


def test_validation_keeps_no_gradients():
    unet = tiny.unet()
    validate(unet)
    assert all(p.grad is None for p in unet.parameters())
