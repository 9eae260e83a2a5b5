"""Latents and text embeddings, encoded once for each photo, caption and base model, and kept on the site's disk.

Enters: a partition, a base model's folder and its fingerprint. Leaves: `Encoded` tensors; neither the autoencoder nor
the text encoder stays in memory. A file is keyed by the fingerprint of the part that made it (and the resolution), a
row by the photo's hash or the caption, so that a changed photo or model encodes again what changed and nothing else.
Photos are written down a few at a time, so that a site that is killed goes on where it was. What another version wrote
is encoded again, and removed.
Errors: MODEL-06 (numbers that are not finite are never kept).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app import family
from app.errors import ModelError
from app.model import load_text_encoder, load_tokenizer, load_vae
from app.site.photos.captions import MAX_CAPTION
from app.site.photos.data import Partition, Photo
from app.site.photos.data import pixels as pixels_of
from app.site.photos.images import READING, BadImage

BATCH = 16  # captions encoded at a time
PIXELS = 2 * 128**2  # pixels encoded at a time: 8 at 64, one at 512, where it takes the autoencoder about a gigabyte
PART = 16  # photos that a site encodes again, at most, when it was killed
FORM = 2  # the version of the captions' file
# may be mended without a change to the photo's bytes: tried again every time
PASSING = ("changed", "outside", "unreadable")
Rows = dict[str, torch.Tensor]  # by a photo's or a caption's key
Notes = dict[str, str]  # by such a key: why there is no row, or what is said about it


@dataclass(frozen=True)
class Encoded:
    """N photos with M distinct captions, in the host's memory: on a GPU a row of text a photo would be gigabytes.

    latents_NChw: float32, scaled; texts_MTD: the captions' embeddings; text_N: which of them each photo has; blank_TD:
    float32, the empty caption; keys: N hashes. `batch` gives the rows of one pass.
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


def encode(
    partition: Partition, base: Path, sums: dict[str, str], resolution: int, cache: Path, device: torch.device
) -> tuple[Partition, Callable[[tuple[Photo, ...]], Encoded]]:
    """Fill the cache. Returns the partition without undecodable photos, and `rows(photos) -> Encoded`.

    Errors: SITE-01, SITE-02 when too few photos can be decoded; MODEL-06.
    """
    kept = f"latents-{sums['vae'][:16]}-{resolution}"
    latents: Rows = {}
    bad: Notes = {}
    latents_file, parts = cache / f"{kept}-{READING}.safetensors", sorted(cache.glob(f"{kept}-{READING}.part*"))
    for path in (latents_file, *parts):
        found, spoiled = _read(path)
        latents, bad = latents | found, bad | spoiled
    todo = [p for p in partition.photos if p.key not in latents and p.key not in bad]
    if todo:
        for number, (found, spoiled) in enumerate(_encode_photos(todo, base, resolution, device)):
            _write(cache / f"{kept}-{READING}.part-{os.getpid()}-{number}", found, _lasting(spoiled))
            latents, bad = latents | found, bad | spoiled
    if todo or parts:
        keep = {p.key for p in partition.photos}
        lasting = {k: v for k, v in _lasting(bad).items() if k in keep}
        _write(latents_file, {k: v for k, v in latents.items() if k in keep}, lasting)
        former = cache / f"{kept}.safetensors"  # another version's
        for path in (*cache.glob(f"{kept}-{READING}.*"), former):
            if path != latents_file:
                path.unlink(missing_ok=True)
    partition = partition.without(bad).require(2)
    kept = f"text-{sums['text_encoder'][:8]}{sums['tokenizer'][:8]}"
    text_file = cache / f"{kept}-{FORM}.safetensors"
    text, cut = _read(text_file)
    captions = sorted({"", *(p.caption for p in partition.photos)})
    if fresh_captions := [c for c in captions if _digest(c) not in text]:
        fresh, too_long = _encode_captions(fresh_captions, base, device)
        text, cut = text | fresh, cut | too_long
        keep = {_digest(c) for c in captions}
        _write(text_file, {k: text[k] for k in map(_digest, captions)}, {k: v for k, v in cut.items() if k in keep})
        (cache / f"{kept}.safetensors").unlink(missing_ok=True)
    partition = replace(partition, cut=sum(_digest(p.caption) in cut for p in partition.photos))

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


def _lasting(bad: Notes) -> Notes:
    return {key: reason for key, reason in bad.items() if reason not in PASSING}


@torch.no_grad()
def _encode_photos(
    photos: list[Photo], base: Path, resolution: int, device: torch.device
) -> Iterator[tuple[Rows, Notes]]:
    """PART photos and a few at a time: latents by key (the posterior's mean, scaled), and the reasons of the others."""
    vae = load_vae(base).to(device)
    latents: Rows = {}
    bad: Notes = {}
    size = max(1, PIXELS // resolution**2)
    for start in range(0, len(photos), size):
        pixels = {}
        for photo in photos[start : start + size]:
            try:
                pixels[photo.key] = pixels_of(photo, resolution)
            except BadImage as error:
                bad[photo.key] = error.reason
        if pixels:
            mean = (
                vae.encode(torch.stack(list(pixels.values())).to(device)).latent_dist.mean * vae.config.scaling_factor
            )
            latents |= dict(zip(pixels, _finite(mean, base / "vae").cpu().unbind(), strict=True))
        done = min(start + size, len(photos))
        if 10 * done // len(photos) > 10 * start // len(photos):  # ten lines, however many photos
            print(f"bouquet: encoded {done}/{len(photos)} photos", flush=True)
        if done == len(photos) or len(latents) + len(bad) >= PART:
            yield latents, bad
            latents, bad = {}, {}


def _finite(numbers: torch.Tensor, part: Path) -> torch.Tensor:
    """Errors: MODEL-06."""
    if not torch.isfinite(numbers).all():
        fix = (
            "take a copy of this part that works in 32 bits: one that was made for 16, or is damaged, gives such"
            " numbers"
        )
        found = f"{part} makes numbers of a site's photos or captions that are not finite"
        raise ModelError("MODEL-06", found=found, fix=fix)
    return numbers


@torch.no_grad()
def _encode_captions(captions: list[str], base: Path, device: torch.device) -> tuple[Rows, Notes]:
    """The text encoder's last hidden state by caption digest: float16 [T, D]; and which captions are cut."""
    tokenizer, encoder = load_tokenizer(base), load_text_encoder(base).to(device)
    out: Rows = {}
    length = family.tokens(base)
    cut = {_digest(caption): "cut" for caption in _too_long(captions, tokenizer, length)}
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        ids = tokenizer(_short(part), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        hidden = _finite(encoder(ids.input_ids.to(device)).last_hidden_state.half(), base / "text_encoder").cpu()
        out |= {_digest(c): row for c, row in zip(part, hidden, strict=True)}
    return out, cut


def too_long(captions: Iterable[str], base: Path) -> int:
    """How many of these captions the base model reads only the beginning of. Errors: MODEL-03."""
    captions = list(captions)
    return len(_too_long(captions, load_tokenizer(base), family.tokens(base)))


def _too_long(captions: list[str], tokenizer: Any, length: int) -> list[str]:
    """Those of more tokens than that, their beginning and end included."""
    long = []
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        counted = zip(part, tokenizer(_short(part), verbose=False).input_ids, strict=True)
        long += [caption for caption, ids in counted if len(ids) > length]
    return long


def _short(captions: list[str]) -> list[str]:
    return [caption[:MAX_CAPTION] for caption in captions]  # a template may have made them longer


def _read(path: Path) -> tuple[Rows, Notes]:
    """Rows by key and notes by key; nothing where there is no file, or one that was cut off (it is encoded again)."""
    try:
        with safe_open(path, "pt") as file:
            note, rows = file.metadata(), file.get_tensor("rows")
        return dict(zip(json.loads(note["keys"]), rows.unbind(), strict=True)), json.loads(note["bad"])
    except FileNotFoundError:
        return {}, {}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        print(f"bouquet: {path.name} is damaged, and what it held is encoded again", flush=True)
        return {}, {}


def _write(path: Path, rows: Rows, bad: Notes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    stacked = torch.stack(list(rows.values())).contiguous() if rows else torch.zeros(0)
    save_file({"rows": stacked}, temporary, metadata={"keys": json.dumps(list(rows)), "bad": json.dumps(bad)})
    temporary.replace(path)
