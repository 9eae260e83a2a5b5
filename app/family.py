"""What kind of base model a folder holds, and whether this version can train it.

Enters: a folder in diffusers' layout; its settings alone are read. Leaves: nothing, or a refusal by name, before
anything of the model is loaded: `check` is asked by the hub when a run begins, by a site's preflight, and by
everything that loads a part (model.py). A kind of base model is known by `_class_name` in model_index.json and has
one entry in FAMILIES, which says what its settings must be for the training to be of that model. Errors: MODEL-03
(cannot be read), MODEL-05 (of a kind that is not known).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app import text
from app.errors import ModelError

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LARGEST = 64_000_000  # bytes of a text file: a tokenizer's are some
PREDICTED = ("epsilon", "v_prediction")
# no class of diffusers' agrees with all others on what is meant where one is missing
BETAS = ("beta_start", "beta_end", "beta_schedule")
SCHEDULES = (  # noise by betas as DDPMScheduler does, however they draw; the rest is flow matching, EDM or distilled
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
ADDED = (  # what a UNet may want beside a text
    "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type",
    "time_cond_proj_dim",
)  # fmt: skip
# Stable Diffusion's own autoencoder, whose scaling factor (0.18215) older folders do not say
SD_VAE = [128, 256, 512, 512]

Settings = dict[str, dict[str, Any]]  # by part, and "index"


def check(folder: Path) -> None:
    """Errors: MODEL-03, and MODEL-05 unless this base model is of a kind that can be trained here."""
    index = read_json(folder / "model_index.json")
    if not isinstance(kind := index.get("_class_name"), str) or kind not in FAMILIES:
        raise _unknown(folder, f"model_index.json says {text.line(kind, 60)}")
    FAMILIES[kind](folder, index)


# --- Stable Diffusion 1.x, 2.x ----------------------------------------------------------------------------------------


def _stable_diffusion(folder: Path, index: dict[str, Any]) -> None:
    """One UNet2DConditionModel on one autoencoder's latents, led by one CLIP text encoder alone, noised by betas."""
    own: Settings = {part: read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    own |= {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}
    for why in (*_classes(index, own), *_unet(own), *_vae(own["vae"]), *_schedule(own["scheduler"])):
        raise _unknown(folder, why)


def _classes(index: dict[str, Any], own: Settings) -> Iterator[str]:
    """What is of another class, or there besides: model_index.json has a pair [library, class] a part."""
    wanted = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    named = {
        part: pair[1]
        for part, pair in index.items()
        if isinstance(pair, list) and len(pair) == 2 and pair[1] is not None
    }
    for part, name in wanted.items():
        if str(named.get(part)).removesuffix("Fast") != name:
            yield f"its {part} is {text.line(named.get(part), 60)}, not {name}"
    for part in sorted(named.keys() - wanted.keys() - {"scheduler", "safety_checker", "feature_extractor"}):
        yield f"it has a part {text.line(part, 40)} ({text.line(named[part], 60)})"
    for part in ("unet", "vae"):
        if (kind := own[part].get("_class_name")) != wanted[part]:
            yield f"{part}/config.json is of {text.line(kind, 60)}, not {wanted[part]}"
    if (kind := own["text_encoder"].get("model_type")) not in ("clip_text_model", "clip"):
        yield f"its text encoder is a {text.line(kind, 60)}, not CLIP's"


def _unet(own: Settings) -> Iterator[str]:
    unet, vae, encoder = own["unet"], own["vae"], own["text_encoder"]
    latent, into, out = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (into, out) != (latent, latent):
        what = "inpainting, depth and pix2pix models have more than that" if into != latent else "another autoencoder's"
        takes, gives, have = (text.line(number, 20) for number in (into, out, latent))
        yield f"the UNet takes {takes} channels and gives {gives}, the autoencoder's latents have {have}: {what}"
    inner = encoder.get("text_config")
    width = (inner if isinstance(inner, dict) else encoder).get("hidden_size", 512)
    if (heard := unet.get("cross_attention_dim", 1280)) != width:
        listens, is_ = text.line(heard, 40), text.line(width, 40)
        yield f"the UNet listens to a text of width {listens}, and the text encoder's is {is_}"
    for key in ADDED:
        if unet.get(key) is not None:
            yield f"the UNet wants more than a text (unet/config.json: {key} = {text.line(unet[key], 40)})"


def _vae(vae: dict[str, Any]) -> Iterator[str]:
    factor = vae.get("scaling_factor")
    if factor is None and vae.get("block_out_channels") != SD_VAE:
        yield "vae/config.json has no scaling_factor, and the usual one belongs to Stable Diffusion's own autoencoder"
    if factor is not None and (type(factor) not in (int, float) or not 0 < factor < 1e6):
        yield f"vae/config.json: scaling_factor = {text.line(factor, 40)}"
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(key) is not None:
            yield f"the autoencoder's latents are moved (vae/config.json: {key})"


def _schedule(schedule: dict[str, Any]) -> Iterator[str]:
    if (name := schedule.get("_class_name")) not in SCHEDULES:
        yield f"its noise schedule is {text.line(name, 60)}, not one by betas"
    if (predicted := schedule.get("prediction_type", PREDICTED[0])) not in PREDICTED:
        yield f"the UNet predicts {text.line(predicted, 40)}, neither epsilon nor v_prediction"
    if schedule.get("trained_betas") is None and (missing := [key for key in BETAS if schedule.get(key) is None]):
        yield f"scheduler_config.json has no {missing[0]}, and which one is meant differs from class to class"
    if schedule.get("use_flow_sigmas"):
        yield "its noise schedule is set to flow matching (use_flow_sigmas)"
    if schedule.get("rescale_betas_zero_snr") and predicted == PREDICTED[0]:
        yield "its noise schedule ends without any signal (rescale_betas_zero_snr), where epsilon says nothing"


FAMILIES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "StableDiffusionPipeline": _stable_diffusion
}  # by the index's class
KNOWN = "Stable Diffusion 1.x and 2.x and what is made from them (StableDiffusionPipeline with one CLIP text encoder)"


def _unknown(folder: Path, why: str) -> ModelError:
    return ModelError(
        "MODEL-05",
        found=f"{folder}: {why}",
        fix=f"choose a base model of a kind that can: {KNOWN}",
    )


# --- its settings -----------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """An object. Errors: MODEL-03."""
    with readable(path):
        found = json.loads(read_text(path).decode())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    return found


def read_text(path: Path) -> bytes:
    """Errors: MODEL-03."""
    if not path.is_file():
        raise incomplete(f"{path} is missing, or no file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise incomplete(f"{path} has more than {LARGEST} bytes")
    return data


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is read of a base model within. Errors: MODEL-03, whatever its reader says, unless it lacks GPU memory."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise incomplete(f"{path} cannot be read: {type(error).__name__} {error}"[:500]) from error


def incomplete(found: str) -> ModelError:
    fix = f"copy the whole model in diffusers layout, weights as safetensors: {', '.join(PARTS)}, model_index.json"
    return ModelError("MODEL-03", found=found, fix=fix)


def tokens(base: Path) -> int:
    """Of a caption, padded or cut: the tokenizer's `model_max_length`, and at most as many as the text encoder has
    positions for.

    Many published tokenizers leave it unset, which is 1e30. A text encoder that names no `max_position_embeddings` has
    CLIP's 77.
    Errors: MODEL-03.
    """
    encoder = read_json(base / "text_encoder" / "config.json")
    tokenizer = read_json(base / "tokenizer" / "tokenizer_config.json")
    inner = encoder.get("text_config")
    positions = _length((inner if isinstance(inner, dict) else encoder).get("max_position_embeddings")) or 77
    return min(positions, _length(tokenizer.get("model_max_length")) or positions)


def _length(value: object) -> int:
    """0 for what is no number of tokens."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    return int(value) if 1 <= value < float("inf") else 0
