"""Latents and text embeddings, encoded once for each photo, caption and base model, and kept on the site's disk.

Enters: a partition, a base model's folder and its fingerprint. Leaves: `Encoded` tensors; neither the autoencoder nor the
text encoder stays in memory. A file is keyed by the fingerprint of the part that made it (and the resolution), a row by the
photo's hash or the caption, so that a changed photo or model encodes again what changed and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app.data import Partition, Photo
from app.data import pixels as pixels_of
from app.folders import MAX_CAPTION
from app.images import BadImage
from app.model import LOCAL, read_json, readable

BATCH = 16  # captions encoded at a time
PIXELS = 2 * 128**2  # pixels encoded at a time: 8 at 64, one at 512, where it takes the autoencoder about a gigabyte
PASSING = ("changed", "outside", "unreadable")  # may be mended without a change to the photo's bytes: tried again every time


@dataclass(frozen=True)
class Encoded:
    """N photos with M distinct captions, in the host's memory: on a GPU a row of text a photo would be gigabytes.

    latents_NChw: float32, scaled; texts_MTD: the captions' embeddings; text_N: which of them each photo has; blank_TD: float32,
    the empty caption; keys: N hashes. `batch` gives the rows of one pass.
    """

    latents_NChw: torch.Tensor
    texts_MTD: torch.Tensor
    text_N: torch.Tensor
    blank_TD: torch.Tensor
    keys: list[str]

    @classmethod
    def of(cls, latents_NChw: torch.Tensor, text_NTD: torch.Tensor, blank_TD: torch.Tensor, keys: list[str]) -> Encoded:
        """Where each photo has a caption of its own."""
        return cls(latents_NChw, text_NTD, torch.arange(len(keys)), blank_TD, keys)

    @property
    def text_NTD(self) -> torch.Tensor:
        """float32, a row a photo."""
        return self.texts_MTD[self.text_N].float()

    def batch(self, pick_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(latents_BChw, text_BTD) of these photos, float32."""
        return self.latents_NChw[pick_B], self.texts_MTD[self.text_N[pick_B]].float()


def encode(partition: Partition, base: Path, sums: dict[str, str], resolution: int, cache: Path, device: torch.device) -> tuple[Partition, Callable]:
    """Fill the cache. Returns the partition without undecodable photos, and `rows(photos) -> Encoded`.

    Errors: SITE-01, SITE-02 when too few photos can be decoded.
    """
    latents_file = cache / f"latents-{sums['vae'][:16]}-{resolution}.safetensors"
    text_file = cache / f"text-{sums['text_encoder'][:8]}{sums['tokenizer'][:8]}.safetensors"
    latents, bad = _read(latents_file)
    todo = [p for p in partition.photos if p.key not in latents and p.key not in bad]
    if todo:
        fresh, spoiled = _encode_photos(todo, base, resolution, device)
        latents, bad = latents | fresh, bad | spoiled
        keep = {p.key for p in partition.photos}
        lasting = {k: v for k, v in bad.items() if k in keep and v not in PASSING}
        _write(latents_file, {k: v for k, v in latents.items() if k in keep}, lasting)
    partition = partition.without(bad).require(2)
    text, _ = _read(text_file)
    captions = sorted({"", *(p.caption for p in partition.photos)})
    if fresh_captions := [c for c in captions if _digest(c) not in text]:
        text |= _encode_captions(fresh_captions, base, device)
        _write(text_file, {_digest(c): text[_digest(c)] for c in captions}, {})

    def rows(photos: tuple[Photo, ...]) -> Encoded:
        distinct = {caption: number for number, caption in enumerate(dict.fromkeys(p.caption for p in photos))}
        return Encoded(
            torch.stack([latents[p.key] for p in photos]).float(),
            torch.stack([text[_digest(caption)] for caption in distinct]),
            torch.tensor([distinct[p.caption] for p in photos]),
            text[_digest("")].float(),
            [p.key for p in photos],
        )

    return partition, rows


def _digest(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


@torch.no_grad()
def _encode_photos(photos: list[Photo], base: Path, resolution: int, device: torch.device) -> tuple[dict, dict[str, str]]:
    """Latents by key (the posterior's mean, scaled), and the reason for each photo that cannot be decoded."""
    from diffusers import AutoencoderKL

    with readable(base / "vae"):
        vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32, **LOCAL)
    vae = vae.to(device).eval()
    latents, bad, size = {}, {}, max(1, PIXELS // resolution**2)
    for start in range(0, len(photos), size):
        pixels = {}
        for photo in photos[start : start + size]:
            try:
                pixels[photo.key] = pixels_of(photo, resolution)
            except BadImage as error:
                bad[photo.key] = error.reason
        if pixels:
            mean = vae.encode(torch.stack(list(pixels.values())).to(device)).latent_dist.mean * vae.config.scaling_factor
            latents |= dict(zip(pixels, mean.cpu().unbind(), strict=True))
        done = min(start + size, len(photos))
        if 10 * done // len(photos) > 10 * start // len(photos):  # ten lines, however many photos
            print(f"bouquet: encoded {done}/{len(photos)} photos", flush=True)
    return latents, bad


@torch.no_grad()
def _encode_captions(captions: list[str], base: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The text encoder's last hidden state by caption digest: float16 [T, D]."""
    from transformers import CLIPTextModel, CLIPTokenizer

    with readable(base / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True)
    with readable(base / "text_encoder"):
        encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32, **LOCAL)
    encoder = encoder.to(device).eval()
    out, length = {}, tokens(base)
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        cut = [c[:MAX_CAPTION] for c in part]  # a template may have made them longer
        ids = tokenizer(cut, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        hidden = encoder(ids.input_ids.to(device)).last_hidden_state.half().cpu()
        out |= {_digest(c): row for c, row in zip(part, hidden, strict=True)}
    return out


def tokens(base: Path) -> int:
    """Of a caption, padded or cut: the tokenizer's `model_max_length`, and at most as many as the text encoder has positions for.

    Many published tokenizers leave it unset, which is 1e30. A text encoder that names no `max_position_embeddings` has CLIP's 77.
    Errors: MODEL-03.
    """
    encoder = read_json(base / "text_encoder" / "config.json")
    tokenizer = read_json(base / "tokenizer" / "tokenizer_config.json")
    inner = encoder.get("text_config")
    positions = _length((inner if isinstance(inner, dict) else encoder).get("max_position_embeddings")) or 77
    return min(positions, _length(tokenizer.get("model_max_length")) or positions)


def _length(value: object) -> int:
    """0 for what is no number of tokens."""
    return int(value) if type(value) in (int, float) and 1 <= value < float("inf") else 0


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Rows by key and reasons by key; nothing where there is no file, or one that was cut off (it is encoded again)."""
    try:
        with safe_open(path, "pt") as file:
            note, rows = file.metadata(), file.get_tensor("rows")
    except (FileNotFoundError, SafetensorError):
        return {}, {}
    return dict(zip(json.loads(note["keys"]), rows.unbind(), strict=True)), json.loads(note["bad"])


def _write(path: Path, rows: dict[str, torch.Tensor], bad: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    stacked = torch.stack(list(rows.values())).contiguous() if rows else torch.zeros(0)
    save_file({"rows": stacked}, temporary, metadata={"keys": json.dumps(list(rows)), "bad": json.dumps(bad)})
    temporary.replace(path)
