"""Flux.1: a transformer on packed latents, led by T5 word by word and by CLIP as a whole, distilled for guidance (dev)
or not (schnell).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from app.config import RunConfig
from app.families.base import ATTENTION, Conditions, FlowFamily, Repository, Settings, differs, text_width

JOINT = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
OWN = tuple(f"attn.{layer}" for layer in ATTENTION)
GUIDANCE = 1.0  # what a net that is distilled for guidance is told while it learns: its own photos need no push


class Flux(FlowFamily):
    pipeline = "FluxPipeline"
    label = "Flux.1"
    longest = 512  # of T5; CLIP reads its 77 beside it
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer_2": ("T5Tokenizer",),
    }
    absent: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    repositories: ClassVar[dict[str, Repository]] = {
        "flux.1-dev": Repository(
            "black-forest-labs/FLUX.1-dev",
            "0ef5fff789c832c5c7f4e127f94c8b54bbcced44",
            "FLUX.1 [dev] Non-Commercial",
            gated=True,
        ),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": OWN + JOINT, "attention+mlp": OWN + JOINT + MLP}

    def unlike(self, own: Settings) -> Iterator[str]:
        width = text_width(own["text_encoder_2"], "d_model")
        yield from differs(
            own, net=self.net, channels="in_channels", factor=4, width="joint_attention_dim", widths=width
        )
        if (heard := own["transformer"].get("pooled_projection_dim")) != (made := text_width(own["text_encoder"])):
            yield f"its transformer hears a pooled text of {str(heard)[:20]}, and CLIP's is {str(made)[:20]}"

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """T5's hidden state, "text" [T, D] (512, 4096), and CLIP's pooled one, "pooled" [P] (768)."""
        hidden, pooled, _ = self.encoder(parts).encode_prompt(
            captions, captions, device=parts["text_encoder"].device, max_sequence_length=tokens
        )
        return [{"text": row, "pooled": whole} for row, whole in zip(hidden, pooled, strict=True)]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        from diffusers import FluxPipeline as Pipeline

        (count, channels, height, width), device = noisy_BChw.shape, noisy_BChw.device
        out = net(
            hidden_states=Pipeline._pack_latents(noisy_BChw, count, channels, height, width),
            timestep=told_B / 1000,
            guidance=torch.full((count,), GUIDANCE, device=device) if net.config.guidance_embeds else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["text"],
            txt_ids=torch.zeros(given["text"].shape[1], 3, device=device, dtype=noisy_BChw.dtype),
            img_ids=Pipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, noisy_BChw.dtype),
        ).sample
        # a scale of 1, since these are the latents' own sides
        predicted: Tensor = Pipeline._unpack_latents(out, height * 2, width * 2, 2)
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        net = own["transformer"]
        return {"text": (tokens, net["joint_attention_dim"]), "pooled": (net["pooled_projection_dim"],)}

    def notes(self, config: RunConfig, adapter: Mapping[str, Tensor]) -> dict[str, str]:
        """An adapter for [schnell] has the same shapes: of base models by other names nothing is said."""
        dev = {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}
        return dev if config.base_model in self.repositories else {}


FAMILY = Flux()
