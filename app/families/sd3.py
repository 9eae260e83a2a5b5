"""Stable Diffusion 3.5: a transformer led by two CLIP text encoders and T5 beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from app import text
from app.families.base import Conditions, FlowFamily, Repository, Settings, differs, text_width
from app.families.flux import JOINT, MLP, OWN


class StableDiffusion3(FlowFamily):
    pipeline = "StableDiffusion3Pipeline"
    label = "Stable Diffusion 3.5"
    longest = 256  # of T5; both CLIPs read their 77 before it
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "tokenizer": ("CLIPTokenizer",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer_3": ("T5Tokenizer",),
    }
    absent: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    repositories: ClassVar[dict[str, Repository]] = {
        "stable-diffusion-3.5-medium": Repository(
            "stabilityai/stable-diffusion-3.5-medium",
            "b940f670f0eda2d07fbb75229e779da1ad11eb80",
            "Stability AI Community",
            gated=True,
        ),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": OWN + JOINT, "attention+mlp": OWN + JOINT + MLP}

    def unlike(self, own: Settings) -> Iterator[str]:
        width = text_width(own["text_encoder_3"], "d_model")
        yield from differs(
            own, net=self.net, channels="in_channels", factor=1, width="joint_attention_dim", widths=width
        )
        pooled = [text_width(own[part], "projection_dim") for part in ("text_encoder", "text_encoder_2")]
        whole = sum(pooled) if all(type(number) is int for number in pooled) else None
        if (heard := own["transformer"].get("pooled_projection_dim")) != whole:
            heard, whole = text.line(heard, 20), text.line(whole, 20)
            yield f"its transformer hears a pooled text of {heard}, and both CLIPs' is {whole}"

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """Both CLIPs' hidden states beside each other and T5's after them, "text" [77 + T, D] (333, 4096), and both
        CLIPs' projections, "pooled" [P] (2048).
        """
        hidden, _, pooled, _ = self.encoder(parts).encode_prompt(
            captions, captions, captions, device=parts["text_encoder"].device,
            do_classifier_free_guidance=False, max_sequence_length=tokens,
        )  # fmt: skip
        return [{"text": row, "pooled": whole} for row, whole in zip(hidden, pooled, strict=True)]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        predicted: Tensor = net(
            hidden_states=noisy_BChw,
            timestep=told_B,
            encoder_hidden_states=given["text"],
            pooled_projections=given["pooled"],
        ).sample
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        net = own["transformer"]
        return {"text": (77 + tokens, net["joint_attention_dim"]), "pooled": (net["pooled_projection_dim"],)}


FAMILY = StableDiffusion3()
