"""Z-Image: a single-stream transformer, led by a Qwen3 language model; captions are as long as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

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

MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


class ZImage(FlowFamily):
    pipeline = "ZImagePipeline"
    label = "Z-Image"
    longest = 512  # of a caption within its template, as the pipeline reads it
    classes: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("ZImageTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("Qwen3Model", "Qwen3ForCausalLM"),
        "tokenizer": ("Qwen2Tokenizer",),
    }
    repositories: ClassVar[dict[str, Repository]] = {
        "z-image": Repository("Tongyi-MAI/Z-Image", "04cc4abb7c5069926f75c9bfde9ef43d49423021", "Apache-2.0"),
    }
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ATTENTION, "attention+mlp": ATTENTION + MLP}

    def unlike(self, own: Settings) -> Iterator[str]:
        width = text_width(own["text_encoder"])
        yield from differs(own, net=self.net, channels="in_channels", factor=1, width="cap_feat_dim", widths=width)
        if own["transformer"].get("siglip_feat_dim") is not None:
            yield "its transformer wants a picture beside the text (siglip_feat_dim)"

    def room(self, tokenizer: Any, tokens: int) -> int:
        return tokens - before(tokenizer)

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """The language model's last hidden state but one, its own tokens alone: "text" [T, D]."""
        device = parts["text_encoder"].device
        rows, _ = self.encoder(parts).encode_prompt(
            list(captions), device=device, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return [{"text": row} for row in rows]

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        """The net is told how far it is from noise, 0 to 1, and predicts the other way: z - n."""
        rows = [row[:length] for row, length in zip(given["text"], given["mask"].sum(1).tolist(), strict=True)]
        out = net(list(noisy_BChw.unsqueeze(2)), (1000 - told_B) / 1000, rows, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        return {"text": (tokens, own["transformer"]["cap_feat_dim"])}


FAMILY = ZImage()
