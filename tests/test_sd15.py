"""Stable Diffusion 1.5's own architecture, built from its config with random weights: the path to it, without the
download.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from app import model
from app.adapter import formats, store
from app.config import RunConfig
from app.families import sd
from app.families.noise import Betas
from app.site import cache, diffusion, train
from tests.kit import tiny

pytestmark = pytest.mark.slow
FIXTURES = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "sd15-fixtures"
LORA = FIXTURES / "diffusers_sd_pokemon_lora.safetensors"
CONFIG = RunConfig.read(
    {
        "base-model": "stable-diffusion-v1-5",
        "resolution": 64,
        "local-steps": 1,
        "batch-size": 1,
        "lora-rank": 4,
        "lora-targets": "attention",
        "learning-rate": 1e-4,
        "precision": "fp32",
    }
)


@pytest.fixture(scope="module")
def photos() -> cache.Encoded:
    """Two 64-pixel photos, as SD 1.5's autoencoder (8×, 4 channels) and text encoder (77 tokens, 768 features) shape
    them.
    """
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 768, generator=draw)
    return cache.Encoded.of(latents, text, torch.zeros(77, 768), ["rose", "lily"])


@pytest.fixture(scope="module")
def objective() -> diffusion.Objective:
    return diffusion.Objective(
        sd.FAMILY,
        Betas(
            DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            )
        ),
    )


@pytest.fixture(scope="module")
def unet():
    """The UNet of the model's unet/config.json: 860 million numbers, 3.4 GB."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    ).requires_grad_(False)
    model.add_adapter(net, sd.FAMILY, CONFIG)
    yield net
    del net
    gc.collect()


@pytest.fixture(scope="module")
def trained(unet, objective, photos) -> tuple[model.Adapter, model.Adapter, float]:
    """(adapter before, adapter after, loss) of one step."""
    before = model.adapter_of(unet)
    loss = train.fit(unet, objective, photos, CONFIG, train.accelerator(CONFIG), seed=1)
    return before, model.adapter_of(unet), loss


def test_the_architecture_is_stable_diffusions(unet):
    assert sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name) == 859_520_964


def test_rank_4_on_attention_is_797184_numbers_in_256_tensors(unet):
    adapter = model.adapter_of(unet)
    assert (len(adapter), sum(value.numel() for value in adapter.values())) == (256, 797_184)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 797_184


def test_one_step_changes_every_b_and_keeps_the_rest_finite(trained):
    before, after, loss = trained
    assert math.isfinite(loss) and 0 < loss < 10
    # B is zero at first, so A has no gradient in the first step and Adam leaves it alone.
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert moved == {key for key in after if ".lora_B." in key}
    model.check_adapter(after, before)


def test_the_steps_adapter_changes_the_validation(unet, objective, photos, trained):
    before, after, _ = trained
    loss = {}
    for name, adapter in (("before", before), ("after", after)):
        assert model.apply_adapter(unet, adapter) == model.adapter_hash(adapter)
        first = cache.Encoded.of(photos.latents_NChw[:1], photos.text_NTD[:1], photos.blank_TD, photos.keys[:1])
        loss[name] = diffusion.validation_loss(unet, objective, first, torch.device("cpu"), timesteps=1, batch_size=1)
    assert loss["before"] != loss["after"] and all(map(math.isfinite, loss.values()))


def test_the_exported_file_has_the_tensors_of_a_published_stable_diffusion_lora(tmp_path, trained):
    if not LORA.exists():
        pytest.skip("the published LoRA ../shared/data/sd15-fixtures/diffusers_sd_pokemon_lora.safetensors is not here")
    final = formats.write_final(tmp_path, trained[1], CONFIG, sd.FAMILY)
    ours = {key: tuple(value.shape) for key, value in load_file(final / "pytorch_lora_weights.safetensors").items()}
    with safe_open(LORA, "pt") as file:
        published = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    renamed = {
        key.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): shape
        for key, shape in published.items()
    }
    assert ours == renamed
    assert tiny.equal(store.read_adapter(final), trained[1])


def test_a_published_lora_is_an_adapter_that_the_app_applies(unet):
    if not LORA.exists():
        pytest.skip("the published LoRA ../shared/data/sd15-fixtures/diffusers_sd_pokemon_lora.safetensors is not here")
    names = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
    adapter = {}
    for key, value in load_file(LORA).items():
        for old, new in names.items():
            key = key.replace(old, new)
        adapter[key.removeprefix("unet.")] = value
    assert model.apply_adapter(unet, adapter) == model.adapter_hash(adapter)


def test_stable_diffusions_tokenizer_gives_77_tokens_from_the_published_vocabulary():
    if not FIXTURES.exists():
        pytest.skip("the tokenizer ../shared/data/sd15-fixtures/clip-tokenizer is not here")
    # as in the model's own config
    tokenizer = CLIPTokenizer.from_pretrained(FIXTURES / "clip-tokenizer", local_files_only=True, model_max_length=77)
    ids = tokenizer(
        ["", "a photo of a cat"], padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    assert [len(row) for row in ids] == [77, 77]
    assert ids[0][:2] == [49406, 49407] and ids[1][:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
