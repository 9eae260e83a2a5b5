"""SDXL: a UNet led by two CLIP text encoders, by what the second makes of the whole caption, and by sizes and crop.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.2 (the sizes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from app import text
from app.config import RunConfig
from app.families.base import Conditions, Repository, Settings, text_tokens, text_width
from app.families.sd import ADDED, StableDiffusion, unlike


class SDXL(StableDiffusion):
    pipeline = "StableDiffusionXLPipeline"
    label = "SDXL"
    classes: ClassVar[dict[str, tuple[str, ...]]] = StableDiffusion.classes | {
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer",),
    }
    repositories: ClassVar[dict[str, Repository]] = {
        "stable-diffusion-xl-base-1.0": Repository(
            "stabilityai/stable-diffusion-xl-base-1.0",
            "462165984030d82259a11f4367a4eed129e94a7b",
            "CreativeML Open RAIL++-M",
        ),
    }
    absent: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}
    options: ClassVar[dict[str, Any]] = {"force_zeros_for_empty_prompt": True}

    def misfits(self, own: Settings) -> Iterator[str]:
        unet, second = own["unet"], own["text_encoder_2"]
        if (kind := unet.get("addition_embed_type")) != "text_time":
            yield f"its UNet is led by {text.line(kind, 40)} beside the text, not by text_time"
        first, widths = text_width(own["text_encoder"]), text_width(second)
        both = first + widths if type(first) is type(widths) is int else None
        yield from unlike(own, both, tuple(key for key in ADDED if key != "addition_embed_type"))
        pooled = text_width(second, "projection_dim")
        wanted, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
        if type(pooled) is not int or type(each) is not int or wanted != pooled + 6 * each:
            wanted, pooled, each = (text.line(number, 20) for number in (wanted, pooled, each))
            have = f"a pooled text of {pooled} and six sizes of {each}"
            yield f"its UNet hears {wanted} numbers beside the text, and there are {have}"

    def tokens(self, folder: Path) -> int:
        return min(text_tokens(folder, f"text_encoder{end}", f"tokenizer{end}") for end in ("", "_2"))

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """Both encoders' last hidden state but one beside each other, "text" [T, D1 + D2] (77, 2048), and the second's
        projection, "pooled" [P] (1280).
        """
        for name in ("tokenizer", "tokenizer_2"):
            parts[name].model_max_length = tokens
        pipe = self.encoder(parts)
        hidden, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
        return [{"text": row, "pooled": whole} for row, whole in zip(hidden, pooled, strict=True)]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        added = {"text_embeds": given["pooled"], "time_ids": given["size"]}
        predicted: Tensor = net(noisy_BChw, told_B, given["text"], added_cond_kwargs=added).sample
        return predicted

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        pooled = text_width(own["text_encoder_2"], "projection_dim")
        return super().shapes(own, tokens) | {"pooled": (pooled,), "size": (6,)}

    def notes(self, config: RunConfig, adapter: Mapping[str, Tensor]) -> dict[str, str]:
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_base_model_version": "sdxl_base_v1-0",
        }  # fmt: skip


FAMILY = SDXL()
