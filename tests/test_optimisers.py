"""What takes a site's steps: the first one by hand, a library that is not there, and what each keeps."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from app import model
from app.errors import SiteError
from app.site import diffusion, optimisers, train
from bouquet.site import estimate
from tests.kit import tiny
from tests.test_train import encoded

CPU = torch.device("cpu")
ALL = [
    "adamw",
    "adafactor",
    pytest.param(
        "adamw-8bit", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is an extra")
    ),
]


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_is_the_rate_long_for_a_number_at_0_and_for_a_large_one(name):
    """Of a gradient that is alike everywhere each divides by its own size; Adafactor not by the parameter's."""
    for start in (0.0, 5.0):
        weight = torch.nn.Parameter(torch.full((64, 128), start))
        weight.grad = torch.full_like(weight, 0.3)
        optimisers.of(tiny.config(optimizer=name, learning_rate=0.01), [weight], CPU).step()
        torch.testing.assert_close(weight.detach(), torch.full((64, 128), start - 0.01), rtol=0, atol=1e-5)


def test_adamw_is_the_one_of_before():
    made = optimisers.of(tiny.CONFIG, [torch.nn.Parameter(torch.zeros(1))], CPU)
    assert type(made) is torch.optim.AdamW and made.defaults["weight_decay"] == 0 and made.defaults["lr"] == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_rounds_learn_and_repeat_bit_for_bit(name):
    config = tiny.config(local_steps=8, learning_rate=0.03, caption_dropout=0.0, optimizer=name)

    def losses() -> tuple[list[float], model.Adapter]:
        unet = tiny.unet(config)
        model.apply_adapter(unet, tiny.fresh(config))
        objective, accelerator = diffusion.Objective.of(tiny.base()), train.accelerator(config)
        seen = [train.fit(unet, objective, encoded(), config, accelerator, number) for number in (1, 2, 3)]
        return seen, model.adapter_of(unet)

    one, other = losses(), losses()
    assert one[0][2] < 0.95 * one[0][0] and one[0] == other[0] and tiny.equal(one[1], other[1])


def test_a_library_that_is_not_there_is_named_with_how_it_is_got_before_the_net_is_loaded(monkeypatch):
    monkeypatch.setitem(optimisers.LIBRARIES, "adamw-8bit", "nobodys_bits")
    config = tiny.config(optimizer="adamw-8bit")
    monkeypatch.setattr(model, "load_net", None)
    with pytest.raises(SiteError, match="SITE-16  The site lacks nobodys_bits") as caught:
        train.load(tiny.base(), config, train.accelerator(config))
    assert "pip install -c constraints.txt nobodys_bits" in caught.value.fix


@pytest.mark.parametrize(("name", "bytes_a_number"), [("adafactor", 7.5), ("adamw-8bit", 8 - 2 - 8 / 256)])
def test_the_estimate_counts_what_it_keeps(name, bytes_a_number):
    """AdamW keeps 8 bytes a number that is trained; the peak falls by the difference."""
    numbers = sum(value.numel() for value in tiny.fresh().values())
    usual, other = (
        estimate.estimate(tiny.base(), tiny.config(optimizer=kind), half=False, on_gpu=True).floor
        for kind in ("adamw", name)
    )
    assert usual - other == pytest.approx(numbers * bytes_a_number, abs=1)
