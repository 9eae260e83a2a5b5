"""Pictures that are no squares, in every family: each net is asked as its own pipeline asks it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from app import families, model
from app.site import diffusion
from app.site.photos.views import View
from bouquet.site import estimate
from tests.kit import families as kit
from tests.test_families import FLOWS, as_scripts_call, photos

HEIGHT, WIDTH = 64, 32
NAMES = [name for name in kit.ALL if name != "sd-v"]


def latents(name: str, count: int = 2) -> Tensor:
    base = kit.base(name)
    pixels = torch.rand(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return families.of(base).latents(model.load(base, "vae"), pixels)


def asked(net: torch.nn.Module, call: Any) -> dict[str, Any]:
    """What a net is given by name while `call` runs: the first time."""
    found: list[dict[str, Any]] = []
    hook = net.register_forward_pre_hook(lambda _, args, given: found.append({"args": args} | given), with_kwargs=True)
    try:
        with torch.no_grad():
            call()
    finally:
        hook.remove()
    return found[0]


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.float(), other.float()) if isinstance(one, Tensor) else one == other


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler under numpy 2.4
@pytest.mark.parametrize("name", NAMES)
def test_a_net_is_told_of_a_tall_picture_as_its_pipeline_tells_it(name):
    """Places and sizes are equal, and the latents are of the shape that the pipeline draws from."""
    base, family = kit.base(name), families.of(kit.base(name))
    pipe = getattr(diffusers, family.pipeline).from_pretrained(base, **family.absent)
    pipe.set_progress_bar_config(disable=True)
    net = getattr(pipe, family.net)
    z, given = photos(name).batch(torch.arange(1))
    z = latents(name, 1)
    # SDXL's pipeline takes the original size to be the picture's own
    given["size"] = torch.tensor([View(HEIGHT, WIDTH).frame((WIDTH, HEIGHT), "key")])
    draws = {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 1} | (
        {"true_cfg_scale": 1.0} if name == "qwen-image" else {}
    )
    its = asked(net, lambda: pipe(prompt="x", height=HEIGHT, width=WIDTH, **draws))
    ours = asked(net, lambda: diffusion.predict(net, family, z, torch.tensor([500.0]), given))
    places = [key for key in ("img_ids", "img_shapes") if key in its]
    assert all(same(ours[key], its[key]) for key in places)
    assert len(places) == (name in ("flux", "flux2", "qwen-image"))
    if name == "sdxl":
        assert same(ours["added_cond_kwargs"]["time_ids"], its["added_cond_kwargs"]["time_ids"])
        assert ours["added_cond_kwargs"]["time_ids"].tolist() == [[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]]
    hidden = lambda call: call.get("hidden_states", call["args"][0] if call["args"] else None)  # noqa: E731
    if name == "zimage":
        assert hidden(ours)[0].shape == hidden(its)[0].shape
    else:
        assert hidden(ours).shape == hidden(its).shape


@pytest.mark.parametrize("name", FLOWS)
def test_the_prediction_for_a_tall_picture_is_that_of_diffusers_training_script(name):
    base, family = kit.base(name), families.of(kit.base(name))
    net, z = model.load_net(base).eval(), latents(name)
    _, given = photos(name).batch(torch.arange(2))
    t = torch.tensor([300.0, 700.0])
    with torch.no_grad():
        expected, found = as_scripts_call(name, net, z, t, given), diffusion.predict(net, family, z, t, given)
    assert found.shape == z.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_takes_a_tall_picture_for_as_large_as_it_is(name):
    base, family = kit.base(name), families.of(kit.base(name))
    assert estimate.inputs(base, family, (HEIGHT, WIDTH), 2).latents.shape == latents(name).shape
    assert latents(name).shape[2] == 2 * latents(name).shape[3]
