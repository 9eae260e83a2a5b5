"""Flux.2-klein: a transformer on patches of normalised latents, led by three layers of a Qwen3 language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from app import text
from app.families.base import (
    ATTENTION,
    Conditions,
    FlowFamily,
    Repository,
    Settings,
    before,
    differs,
    text_width,
)

LAYERS = (9, 18, 27)  # of the language model, beside each other
# the single blocks have attention and feed-forward in one matrix, and so have community trainers' adapters
TOGETHER = ("attn.to_qkv_mlp_proj",)


class Flux2Klein(FlowFamily):
    pipeline = "Flux2KleinPipeline"
    label = "Flux.2-klein"
    longest = 512
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("Flux2Transformer2DModel",),
        "vae": ("AutoencoderKLFlux2",),
        "text_encoder": ("Qwen3ForCausalLM",),
        "tokenizer": ("Qwen2Tokenizer",),
    }
    options: ClassVar[dict[str, Any]] = {"is_distilled": False}
    repositories: ClassVar[dict[str, Repository]] = {
        "flux.2-klein-base-4b": Repository(
            "black-forest-labs/FLUX.2-klein-base-4B", "a3b4f4849157f664bdbc776fd7453c2783562f4d", "Apache-2.0"
        ),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ATTENTION + TOGETHER}

    def unlike(self, own: Settings) -> Iterator[str]:
        width = text_width(own["text_encoder"])
        widths = len(LAYERS) * width if type(width) is int else None
        yield from differs(
            own, net=self.net, channels="in_channels", factor=4, width="joint_attention_dim", widths=widths
        )
        if own["transformer"].get("guidance_embeds"):
            yield "its transformer is distilled for guidance (guidance_embeds), as Flux.2-dev's is"
        if type(layers := text_width(own["text_encoder"], "num_hidden_layers")) is not int or layers < LAYERS[-1]:
            yield f"its text encoder has {text.line(layers, 20)} layers, and the last that is read is {LAYERS[-1]}"

    def latents(self, vae: Any, pixels_BCHW: Tensor) -> Tensor:
        """2×2 patches as channels, each by the statistics that the autoencoder's batch norm has kept."""
        z: Tensor = vae.encode(pixels_BCHW).latent_dist.mean
        count, channels, height, width = z.shape
        patches = z.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(count, channels * 4, height // 2, width // 2)
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(z)
        spread = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(z)
        normalised: Tensor = (patches - mean) / spread
        return normalised

    def room(self, tokenizer: Any, tokens: int) -> int:
        return tokens - before(tokenizer)

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """Three of the language model's hidden states beside each other, all padded to T: "text" [T, 3 D]."""
        hidden, _ = self.encoder(parts).encode_prompt(
            captions, device=parts["text_encoder"].device, max_sequence_length=tokens, text_encoder_out_layers=LAYERS
        )
        return [{"text": row} for row in hidden]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        from diffusers import Flux2KleinPipeline as Pipeline

        height, width = noisy_BChw.shape[2:]
        places = Pipeline._prepare_latent_ids(noisy_BChw).to(noisy_BChw.device)
        out = net(
            hidden_states=Pipeline._pack_latents(noisy_BChw),
            timestep=told_B / 1000,
            guidance=None,
            encoder_hidden_states=given["text"],
            txt_ids=Pipeline._prepare_text_ids(given["text"]).to(noisy_BChw.device),
            img_ids=places,
        ).sample
        predicted: Tensor = Pipeline._unpack_latents_with_ids(out, places, height, width)
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, own["transformer"]["joint_attention_dim"])}


FAMILY = Flux2Klein()
