"""Qwen-Image: a transformer on packed latents of a video autoencoder, led by Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from app.config import RunConfig
from app.families.base import ATTENTION, Conditions, FlowFamily, Repository, Settings, differs, text_width
from app.families.flux import JOINT

MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImage(FlowFamily):
    pipeline = "QwenImagePipeline"
    label = "Qwen-Image"
    longest = 1024
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
        "tokenizer": ("Qwen2Tokenizer",),
    }
    repositories: ClassVar[dict[str, Repository]] = {
        "qwen-image": Repository("Qwen/Qwen-Image", "75e0b4be04f60ec59a75f475837eced720f823b6", "Apache-2.0"),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ATTENTION,
        "attention+mlp": ATTENTION + JOINT + MLP,
    }

    def unlike(self, own: Settings) -> Iterator[str]:
        width = text_width(own["text_encoder"])
        yield from differs(
            own, net=self.net, channels="in_channels", factor=4, width="joint_attention_dim", widths=width
        )
        channels = own["vae"].get("z_dim")
        for key in ("latents_mean", "latents_std"):
            numbers = own["vae"].get(key)
            if not isinstance(numbers, list) or len(numbers) != channels or 0 in (numbers if key[8:] == "std" else ()):
                yield f"vae/config.json: {key} is not a number for each of its channels"

    def latents(self, vae: Any, pixels_BCHW: Tensor) -> Tensor:
        """A picture is a film of one frame; each channel by the mean and spread that the settings name."""
        z: Tensor = vae.encode(pixels_BCHW.unsqueeze(2)).latent_dist.mean.squeeze(2)
        mean, spread = (torch.tensor(vae.config[f"latents_{key}"]).view(1, -1, 1, 1).to(z) for key in ("mean", "std"))
        return (z - mean) / spread

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """The language model's last hidden state after its template, a caption's own tokens alone: "text" [T, D]."""
        hidden, mask = self.encoder(parts).encode_prompt(
            list(captions), device=parts["text_encoder"].device, max_sequence_length=tokens
        )
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return [{"text": row[here]} for row, here in zip(hidden, mask, strict=True)]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        from diffusers import QwenImagePipeline as Pipeline

        count, channels, height, width = noisy_BChw.shape
        out = net(
            hidden_states=Pipeline._pack_latents(noisy_BChw.unsqueeze(1), count, channels, height, width),
            timestep=told_B / 1000,
            encoder_hidden_states=given["text"],
            encoder_hidden_states_mask=None if given["mask"].all() else given["mask"].long().to(noisy_BChw.device),
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        # a scale of 8 to pixels, of which these sides are an eighth
        predicted: Tensor = Pipeline._unpack_latents(out, height * 8, width * 8, 8).squeeze(2)
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, own["transformer"]["joint_attention_dim"])}

    def drawing(self, config: RunConfig) -> dict[str, Any]:
        """Its guidance is the true one, which needs something to be led away from."""
        return {"true_cfg_scale": config.sample_guidance, "negative_prompt": " ", "max_sequence_length": self.longest}


FAMILY = QwenImage()
