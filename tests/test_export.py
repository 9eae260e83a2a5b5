"""The final folder: every file of it is the same adapter, and the tools people use draw the same picture from it."""

from __future__ import annotations

import json

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from app.adapter import formats, sample, store
from app.families import sd
from app.hub.history import Provenance
from tests.kit import tiny

ADAPTER = tiny.adapter(3)
PROMPTS = ["a red poppy, meadow background"]


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    return formats.write_final(
        tmp_path_factory.mktemp("run"), ADAPTER, tiny.CONFIG, sd.FAMILY, Provenance(run="7", images=40)
    )


def stock() -> StableDiffusionPipeline:
    """The base model's pipeline as anybody would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny.base(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe) -> np.ndarray:
    """float [16, 16, 3] in [0, 1]."""
    seed = torch.Generator().manual_seed(tiny.CONFIG.seed)
    return pipe(
        PROMPTS, height=16, width=16, num_inference_steps=2, guidance_scale=4.0, generator=[seed], output_type="np"
    ).images[0]


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """The picture under the adapter as the app applies it."""
    pipe = sample.pipeline(tiny.base(), tiny.CONFIG)
    sample.render(pipe, ADAPTER, PROMPTS, tiny.CONFIG)
    return drawn(pipe)


def test_the_final_folder_holds_every_format_and_the_provenance(final):
    assert sorted(path.name for path in final.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fp16",
        "kohya.safetensors",
        "provenance.json",
        "pytorch_lora_weights.safetensors",
    ]
    assert json.loads((final / "provenance.json").read_text()) == {
        "run": "7", "images": 40, "sites": {}, "config": {}, "versions": {}, "version": 1,
    }  # fmt: skip


def test_every_file_holds_the_same_numbers(final):
    files = {"adapter_model.safetensors": "base_model.model.", "pytorch_lora_weights.safetensors": "unet."}
    for name, prefix in files.items():
        tensors = load_file(final / name)
        assert all(key.startswith(prefix) for key in tensors)
        assert tiny.equal({key.removeprefix(prefix): value for key, value in tensors.items()}, ADAPTER)


def test_the_adapter_changes_the_picture(expected):
    assert np.abs(drawn(stock()) - expected).max() > 0.05


def test_diffusers_loads_the_folder_and_draws_the_same_picture(final, expected):
    pipe = stock()
    pipe.load_lora_weights(final)
    np.testing.assert_allclose(drawn(pipe), expected, atol=1e-4)


def test_peft_loads_the_folder_and_draws_the_same_picture(final, expected):
    pipe = stock()
    pipe.unet = PeftModel.from_pretrained(pipe.unet, final).base_model.model
    np.testing.assert_allclose(drawn(pipe), expected, atol=1e-4)


def test_fused_into_the_base_it_draws_the_same_picture(final, expected):
    pipe = stock()
    pipe.load_lora_weights(final)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    np.testing.assert_allclose(drawn(pipe), expected, atol=1e-3)


def test_half_the_strength_is_half_the_adapter(final, expected):
    pipe = stock()
    pipe.load_lora_weights(final)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    halved = sample.pipeline(tiny.base(), tiny.CONFIG)
    half = {key: value * 0.5 if ".lora_B." in key else value for key, value in ADAPTER.items()}
    sample.render(halved, half, PROMPTS, tiny.CONFIG)
    np.testing.assert_allclose(drawn(pipe), drawn(halved), atol=1e-4)


def test_rank_and_alpha_are_in_every_file_and_the_same(final):
    by_peft = json.loads((final / "adapter_config.json").read_text())
    with safe_open(final / "pytorch_lora_weights.safetensors", "pt") as file:
        by_diffusers = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (by_peft["r"], by_peft["lora_alpha"]) == (by_diffusers["unet.r"], by_diffusers["unet.lora_alpha"]) == (2, 2)
    assert (
        by_peft["target_modules"] == by_diffusers["unet.target_modules"] == list(sd.FAMILY.targets["attention+resnet"])
    )


def test_diffusers_takes_the_scale_from_the_file_as_one(final):
    pipe = stock()
    pipe.load_lora_weights(final)
    assert {scale for module in pipe.unet.modules() for scale in getattr(module, "scaling", {}).values()} == {1.0}


def test_the_final_folder_is_read_like_a_rounds(final):
    assert tiny.equal(store.read_adapter(final), ADAPTER)


def test_versions_are_those_installed():
    told = formats.versions()
    assert (told["diffusers"], told["peft"], told["accelerate"]) == (
        diffusers.__version__,
        peft.__version__,
        accelerate.__version__,
    )
    assert torch.__version__.startswith(told["torch"].split("+")[0]) and "flwr" in told
