"""Stable Diffusion 1.x and 2.x: a UNet on an autoencoder's latents, led by one CLIP text encoder, noised by betas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from app import text
from app.config import RunConfig
from app.families.base import ATTENTION, Conditions, Family, Repository, Settings, betas, text_tokens, text_width
from app.families.noise import Schedule

RESNET = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "time_emb_proj")
PREDICTED = ("epsilon", "v_prediction")
# no class of diffusers' agrees with all others on what is meant where one is missing
BETAS = ("beta_start", "beta_end", "beta_schedule")
SCHEDULES = (  # noise by betas as DDPMScheduler does, however they draw; the rest is flow matching, EDM or distilled
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
ADDED = (  # what a UNet may want beside a text
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
# Stable Diffusion's own autoencoder, whose scaling factor (0.18215) older folders do not say
SD_VAE = [128, 256, 512, 512]


class StableDiffusion(Family):
    pipeline = "StableDiffusionPipeline"
    label = "Stable Diffusion 1.x and 2.x"
    net = "unet"
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
    }
    repositories: ClassVar[dict[str, Repository]] = {
        "stable-diffusion-v1-5": Repository(
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            "CreativeML Open RAIL-M",
        ),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ATTENTION, "attention+resnet": ATTENTION + RESNET}
    absent: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }
    multiple = 8
    kept = torch.float16
    large = False
    kohya = True

    def misfits(self, own: Settings) -> Iterator[str]:
        yield from unlike(own, text_width(own["text_encoder"]), ADDED)

    def tokens(self, folder: Path) -> int:
        return text_tokens(folder, "text_encoder", "tokenizer")

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """The text encoder's last hidden state: "text" [T, D]; SD 1.5: T = 77, D = 768."""
        encoder = parts["text_encoder"]
        ids = parts["tokenizer"](
            captions, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
        )
        return [{"text": row} for row in encoder(ids.input_ids.to(encoder.device)).last_hidden_state]

    def schedule(self, folder: Path) -> Schedule:
        return betas(folder)

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        predicted: Tensor = net(noisy_BChw, told_B, given["text"]).sample
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, own["unet"].get("cross_attention_dim", 1280))}

    def notes(self, config: RunConfig, adapter: Mapping[str, Tensor]) -> dict[str, str]:
        """1.x listens to a text of width 768, 2.x of 1024: the same wherever there is attention to it."""
        widths = {value.shape[1] for key, value in adapter.items() if key.endswith("attn2.to_k.lora_A.weight")}
        if widths == {1024}:
            return {"ss_v2": "True"}
        one = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sd_v1"}
        return one if widths == {768} else {}


def unlike(own: Settings, width: Any, added: tuple[str, ...]) -> Iterator[str]:
    """Why no UNet with these settings is trained: its channels, its text of `width`, what else it wants (`added`), the
    autoencoder's latents, the noise schedule.
    """
    unet, vae = own["unet"], own["vae"]
    latent, into, out = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (into, out) != (latent, latent):
        what = "inpainting, depth and pix2pix models have more than that" if into != latent else "another autoencoder's"
        takes, gives, have = (text.line(number, 20) for number in (into, out, latent))
        yield f"the UNet takes {takes} channels and gives {gives}, the autoencoder's latents have {have}: {what}"
    if (heard := unet.get("cross_attention_dim", 1280)) != width:
        heard, width = text.line(heard, 40), text.line(width, 40)
        yield f"the UNet listens to a text of width {heard}, and the text encoder's is {width}"
    for key in added:
        if unet.get(key) is not None:
            yield f"the UNet wants more than a text (unet/config.json: {key} = {text.line(unet[key], 40)})"
    yield from _vae(vae)
    yield from _schedule(own["scheduler"])


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


FAMILY = StableDiffusion()
