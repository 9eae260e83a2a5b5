"""Every file of a final folder draws the same picture, on small models and on Stable Diffusion 1.5's architecture; a
changed one is found.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app import model
from app.adapter import formats
from app.config import RunConfig
from app.errors import AdapterError
from app.families import sd
from bouquet.adapter import parity
from tests.kit import tiny

FIXTURES = tiny.ROOT.parent / "shared" / "data" / "sd15-fixtures"
LORA = FIXTURES / "diffusers_sd_pokemon_lora.safetensors"
PATHS = [(path, precision) for precision in ("fp32", "fp16") for path in ("PEFT", "diffusers", "kohya")] + [
    ("merged", "fp32")
]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(parity, "STEPS", 2)  # a layer that is wrong shows in each


@pytest.fixture(scope="module")
def final(tmp_path_factory) -> Path:
    return formats.write_final(tmp_path_factory.mktemp("parity"), tiny.adapter(3), tiny.CONFIG, sd.FAMILY)


@pytest.fixture
def copy(final, tmp_path) -> Path:
    return shutil.copytree(final, tmp_path / "final")


def trained(base: Path, config: RunConfig, scale: float) -> model.Adapter:
    """An adapter as training leaves one: A as it began, every B moved."""
    draw = torch.Generator().manual_seed(1)
    fresh = model.new_adapter(base, config)
    return {
        key: torch.randn(value.shape, generator=draw) * scale if ".lora_B." in key else value
        for key, value in fresh.items()
    }


def rewrite(file: Path, change, notes: dict[str, str] | None = None) -> None:
    """Apply `change` to a safetensors file's dict of tensors; `notes` replace parts of its metadata."""
    with safe_open(file, "pt") as old:
        known = old.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=known | (notes or {}))


# --- the same picture
# ------------------------------------------------------------------------------------------------------


def test_every_path_draws_the_picture_that_training_meant(final):
    rows = parity.check(final, tiny.base(), tiny.CONFIG)
    assert [(row.path, row.precision) for row in rows] == PATHS
    assert all(row.difference < (0.0001 if row.precision == "fp32" else 0.003) for row in rows)


@pytest.mark.slow
def test_every_path_draws_the_same_picture_on_the_base_model_that_ships(tmp_path):
    base, config = tiny.ROOT / "models" / "mini", RunConfig.read({"lora-rank": 4})
    final = formats.write_final(tmp_path, trained(base, config, 0.1), config, sd.FAMILY)
    assert [(row.path, row.precision) for row in parity.check(final, base, config)] == PATHS


def test_a_share_is_the_mean_difference_over_the_adapters_effect(final, monkeypatch):
    """The base draws 0, training's adapter 0.5, every file 0.45: a difference of 0.05, a tenth of the effect."""
    flat = lambda value: np.full((16, 16, 3), value)  # noqa: E731
    monkeypatch.setattr(parity, "reference", lambda *_: (flat(0.0), flat(0.5)))
    monkeypatch.setattr(parity, "drawn", lambda *_: flat(0.45))
    rows = list(parity.differences(final, tiny.base(), tiny.CONFIG))
    assert [row.difference for row in rows] == pytest.approx([0.1] * len(PATHS)) and not any(row.same for row in rows)


# --- a file that was changed
# -----------------------------------------------------------------------------------------------


def alpha_in_kohyas_tensors(folder: Path) -> None:
    rewrite(
        folder / "kohya.safetensors",
        lambda t: t.update({key: value * 2 for key, value in t.items() if key.endswith(".alpha")}),
    )


def alpha_in_diffusers_metadata(folder: Path) -> None:
    file = folder / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as old:
        notes = json.loads(old.metadata()["lora_adapter_metadata"])
    rewrite(file, lambda t: None, {"lora_adapter_metadata": json.dumps(notes | {"unet.lora_alpha": 4})})


def alpha_in_pefts_settings(folder: Path) -> None:
    settings = json.loads((folder / "fp16" / "adapter_config.json").read_text())
    (folder / "fp16" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))


def a_layer_is_missing(folder: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    rewrite(
        folder / "kohya.safetensors",
        lambda t: [t.pop(f"{name}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha")],
    )


def another_adapter(folder: Path) -> None:
    formats.write_diffusers(folder / "fp16", tiny.adapter(4), tiny.CONFIG, sd.FAMILY)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (alpha_in_kohyas_tensors, "kohya fp32"),
        (alpha_in_diffusers_metadata, "diffusers fp32"),
        (alpha_in_pefts_settings, "PEFT fp16"),
        (a_layer_is_missing, "kohya fp32"),
        (another_adapter, "diffusers fp16"),
    ],
)
def test_a_changed_file_is_refused_by_name(copy, spoil, named):
    spoil(copy)
    with pytest.raises(AdapterError, match="EXPORT-01") as refused:
        parity.check(copy, tiny.base(), tiny.CONFIG)
    wrong = refused.value.found.partition(": ")[2].split(", ")
    assert [row.rsplit(" ", 4)[0] for row in wrong] == [named]


def test_an_adapter_that_changes_nothing_proves_nothing(tmp_path):
    final = formats.write_final(tmp_path, tiny.fresh(), tiny.CONFIG, sd.FAMILY)
    with pytest.raises(AdapterError, match="EXPORT-05"):
        parity.check(final, tiny.base(), tiny.CONFIG)


# --- Stable Diffusion 1.5
# ------------------------------------------------------------------------------------------------------

SD15 = RunConfig.read(
    {
        "base-model": "sd15",
        "resolution": 64,
        "lora-rank": 4,
        "lora-targets": "attention",
        "sample-prompts": "a red poppy",
    }
)


def build(folder: Path, unet: tuple[int, ...], vae: tuple[int, ...]) -> int:
    """A pipeline of Stable Diffusion 1.5's blocks with random weights in half precision, its UNet and autoencoder of
    these widths; how many numbers the UNet has.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny.ROOT / "models" / "mini" / "tokenizer")
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=64,
        down_block_types=(down, down, down, "DownBlock2D"),
        up_block_types=("UpBlock2D", up, up, up),
        block_out_channels=unet,
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=vae,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    words = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=77,
        **ends,
    )
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(words),
        tokenizer=tokenizer,
        unet=net,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)
    return sum(p.numel() for p in net.parameters())


@pytest.fixture
def sd15(tmp_path) -> Path:
    """At its own widths; 2 GB."""
    assert build(tmp_path / "sd15", (320, 640, 1280, 1280), (128, 256, 512, 512)) == 859_520_964
    yield tmp_path / "sd15"
    shutil.rmtree(tmp_path / "sd15")


@pytest.mark.slow
def test_every_path_draws_the_same_picture_on_stable_diffusions_architecture(tmp_path):
    """Every block and layer of it, at a tenth of the width: the names are what the files have to agree on."""
    build(base := tmp_path / "sd15", (32, 64, 128, 128), (32, 32, 64, 64))
    fresh = model.new_adapter(base, SD15)
    assert len(fresh) == 256  # the tensors of a published LoRA
    final = formats.write_final(tmp_path / "run", trained(base, SD15, 0.1), SD15, sd.FAMILY)
    assert [(row.path, row.precision) for row in parity.check(final, base, SD15)] == PATHS


@pytest.mark.slow
def test_a_published_stable_diffusion_lora_draws_the_same_through_our_files_as_through_its_own(sd15, tmp_path):
    if not LORA.exists():
        pytest.skip("the published LoRA ../shared/data/sd15-fixtures/diffusers_sd_pokemon_lora.safetensors is not here")
    lora = formats.read_lora(LORA)
    assert (lora.rank, lora.targets) == (4, "attention")
    model.check_adapter(lora.adapter, model.new_adapter(sd15, SD15))  # as a starting adapter is checked
    final = formats.write_final(tmp_path, lora.adapter, SD15, sd.FAMILY)
    config, pictures = replace(SD15, sample_steps=2), []
    for load in (
        lambda pipe: pipe.load_lora_weights(LORA),
        lambda pipe: parity.with_kohya(pipe, final),
        lambda pipe: None,
    ):
        pipe = parity.stock(sd15)
        load(pipe)
        pictures.append(parity.drawn(pipe, config))
    theirs, ours, plain = pictures
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs - plain).max() > 1e-3
