"""Which base models are of which family, what is refused by name, and how one more is added."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
from torch import Tensor

from app import families, model
from app.errors import ConfigError, ModelError
from app.families import flux, qwen, sd, sdxl
from app.families.base import Conditions, Family
from tests.kit import families as kit
from tests.kit.families import SETTINGS
from tests.kit.memory import Federation

# --- which are known, and what does not fit ---------------------------------------------------------------------------


def edited(name: str, tmp_path: Path, file: str, **changes: Any) -> Path:
    folder = shutil.copytree(kit.base(name), tmp_path / name)
    settings = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


SCHEDULE = "scheduler/scheduler_config.json"
MISFITS = {  # what somebody might have: (family, file, changes, what the refusal says)
    "an SDXL led otherwise": ("sdxl", "unet/config.json", {"addition_embed_type": "image"}, "image"),
    "an SDXL of another pooled text": ("sdxl", "text_encoder_2/config.json", {"projection_dim": 48}, "48"),
    "an SDXL without its second encoder": ("sdxl", "model_index.json", {"text_encoder_2": None}, "text_encoder_2"),
    "a refiner": ("sdxl", "unet/config.json", {"cross_attention_dim": 32}, "width 32"),
    "a flow with betas": ("zimage", SCHEDULE, {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
    "a flow turned round": ("zimage", SCHEDULE, {"invert_sigmas": True}, "invert_sigmas"),
    "a Z-Image of another text": ("zimage", "transformer/config.json", {"cap_feat_dim": 99}, "width 99"),
    "an omni Z-Image": ("zimage", "transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim"),
    "Flux fill": ("flux", "transformer/config.json", {"in_channels": 96}, "96 channels"),
    "a Flux of another T5": ("flux", "text_encoder_2/config.json", {"d_model": 64}, "64"),
    "Flux.2 dev": ("flux2", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds"),
    "a shorter language model": ("flux2", "text_encoder/config.json", {"num_hidden_layers": 20}, "20 layers"),
    "an SD3 of another CLIP": ("sd3", "text_encoder/config.json", {"projection_dim": 48}, "pooled text of 64"),
    "a Qwen-Image without statistics": ("qwen-image", "vae/config.json", {"latents_std": None}, "latents_std"),
    "a T5 where a CLIP belongs": ("flux", "text_encoder/config.json", {"model_type": "t5"}, "t5"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_a_base_model_that_its_family_cannot_train_is_refused_before_anything_is_loaded(what, tmp_path):
    name, file, changes, said = MISFITS[what]
    with pytest.raises(ModelError) as caught:
        families.check(edited(name, tmp_path, file, **changes))
    assert caught.value.code == "MODEL-05" and said in caught.value.found


def test_an_unknown_family_is_refused_with_all_that_are_known(tmp_path):
    folder = edited("sd", tmp_path, "model_index.json", _class_name="HunyuanImagePipeline")
    with pytest.raises(ModelError) as caught:
        families.check(folder)
    assert "HunyuanImagePipeline" in caught.value.found
    assert all(family.label in caught.value.fix for family in families.FAMILIES.values())


WRONG = {  # what a run asks, of which family, and what it is told
    "resnets of a transformer": ("zimage", {"lora_targets": "attention+resnet"}, "attention+mlp"),
    "MLPs of a UNet": ("sdxl", {"lora_targets": "attention+mlp"}, "attention+resnet"),
    "a side that cannot be packed": ("flux", {"resolution": 40}, "48"),
    "an offset for a flow": ("sd3", {"noise_offset": 0.1}, "leave it at 0"),
    "weights of betas for a flow": ("sd3", {"min_snr_gamma": 5.0}, "leave it at 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_run_that_asks_for_what_a_family_does_not_have_is_refused_at_the_hub(what, tmp_path, monkeypatch):
    name, asked, said = WRONG[what]
    kit.base(name)
    federation = Federation(tmp_path, models=kit.models(), base_model=name, **SETTINGS | asked)
    error = federation.fails(monkeypatch, "CONFIG-05")
    assert isinstance(error, ConfigError) and said in error.fix and federation.grid.sent == []


# --- fingerprints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kit.ALL)
def test_a_fingerprint_is_of_every_part_that_is_loaded_and_of_no_other(name, tmp_path):
    folder = shutil.copytree(kit.base(name), tmp_path / name)
    before, family = model.fingerprint(folder), families.of(folder)
    assert before.keys() == {*family.parts, "base"}
    (folder / "README.md").write_text("x")
    (folder / family.net / "diffusion_pytorch_model.bin").write_text("x")
    assert model.fingerprint(folder) == before
    for part in family.classes:
        settings = folder / part / ("tokenizer_config.json" if part.startswith("tokenizer") else "config.json")
        kept = settings.read_bytes()
        settings.write_text(json.dumps(json.loads(kept) | {"a_new_setting": 1}))
        now = model.fingerprint(folder)
        assert {key for key in now if now[key] != before[key]} == {part, "base"}
        settings.write_bytes(kept)


@pytest.mark.parametrize(
    ("name", "option", "value"), [("sdxl", "force_zeros_for_empty_prompt", False), ("flux2", "is_distilled", True)]
)
def test_a_pipelines_option_that_changes_what_is_drawn_changes_the_fingerprint(name, option, value, tmp_path):
    folder = edited(name, tmp_path, "model_index.json", **{option: value})
    assert model.fingerprint(folder)["base"] != model.fingerprint(kit.base(name))["base"]


# --- one file ---------------------------------------------------------------------------------------------------------


class Toy(sd.StableDiffusion):
    """A family of its own: Stable Diffusion's parts under another name, whose net hears each text backwards."""

    pipeline = "ToyPipeline"
    label = "Toy"
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ("to_q",)}

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        return super().predict(net, noisy_BChw, told_B, {"text": given["text"].flip(1)})


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Iterator[Path]:
    """As its one file below app/families would register it; diffusers knows its pipeline by that name."""
    monkeypatch.setitem(families.FAMILIES, "ToyPipeline", Toy())
    pipeline = type("ToyPipeline", (diffusers.StableDiffusionPipeline,), {})
    monkeypatch.setattr(diffusers, "ToyPipeline", pipeline, raising=False)
    folder = tmp_path / "models" / "toy"
    shutil.copytree(kit.base("sd"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "ToyPipeline"}))
    yield folder


def test_a_new_family_is_one_class_and_nothing_else_has_to_know_it(toy, tmp_path, monkeypatch):
    federation = Federation(tmp_path / "run", models=toy.parent, base_model="toy", **SETTINGS)
    final = federation.go(monkeypatch) / "final"
    assert json.loads((final / "adapter_config.json").read_text())["target_modules"] == ["to_q"]
    seen = [entry["weighted"] for entry in federation.history()["validation"]]
    assert seen[0] > seen[2]


def test_every_family_has_a_file_of_its_own_and_says_what_it_is():
    assert {type(family).__module__ for family in families.FAMILIES.values()} == {
        f"app.families.{name}" for name in ("sd", "sdxl", "sd3", "flux", "flux2", "zimage", "qwen")
    }
    assert (flux.FAMILY.label, qwen.FAMILY.label, sdxl.FAMILY.label) == ("Flux.1", "Qwen-Image", "SDXL")
    assert all(hasattr(diffusers, name) and isinstance(family, Family) for name, family in families.FAMILIES.items())
