"""Latents and conditions, encoded once for each photo, caption and base model, and kept on the site's disk.

Enters: a partition, a base model's folder and its fingerprint. Leaves: `Encoded` tensors; neither the autoencoder nor
a text encoder stays in memory, and the two are never there at once. A file is keyed by the fingerprint of the parts
that made it (and the resolution), a row by the photo's hash or the caption, so that a changed photo or model encodes
again what changed and nothing else. Photos are written down a few at a time, so that a site that is killed goes on
where it was. What another version wrote is encoded again, and removed.
Errors: MODEL-06 (numbers that are not finite are never kept).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app import families, model
from app.errors import ModelError
from app.families.base import Conditions, stacked
from app.site.photos.captions import MAX_CAPTION
from app.site.photos.data import Partition, Photo
from app.site.photos.images import READING, BadImage, frame, to_pixels
from app.site.photos.wording import AS_WRITTEN, Wording

BATCH = 16  # captions encoded at a time
PIXELS = 2 * 128**2  # pixels encoded at a time: 8 at 64, one at 512, where it takes the autoencoder about a gigabyte
PART = 16  # photos that a site encodes again, at most, when it was killed
FORM = 3  # the version of the files
# may be mended without a change to the photo's bytes: tried again every time
PASSING = ("changed", "outside", "unreadable")


Rows = dict[str, Conditions]  # by a photo's hash or a caption's digest
Notes = dict[str, str]  # by such a key: why there is no row, or what is said about it


@dataclass(frozen=True)
class Encoded:
    """N photos with M distinct texts, in the host's memory: on a GPU a row of text a photo would be gigabytes.

    latents_NChw: float32; texts: the captions' conditions, mapped from the cache's file, the empty caption's first;
    text_N: which of them each photo has, of several the first; sizes_N6: sizes and crop (families/base.py); keys: N
    hashes; choices: where any photo has several texts, those of each of its captions. `batch` gives the rows of one
    pass.
    """

    latents_NChw: Tensor
    texts: list[Conditions]
    text_N: Tensor
    sizes_N6: Tensor
    keys: list[str]
    choices: list[list[list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, latents_NChw: Tensor, text_NTD: Tensor, blank_TD: Tensor, keys: list[str]) -> Encoded:
        """Where each photo has a caption of its own, and no sizes."""
        texts = [{"text": row} for row in (blank_TD, *text_NTD)]
        return cls(latents_NChw, texts, torch.arange(len(keys)) + 1, torch.zeros(len(keys), 6).long(), keys)

    @property
    def text_NTD(self) -> Tensor:
        """float32, a row a photo, where all are of one length."""
        return torch.stack([self.texts[number]["text"] for number in self.text_N.tolist()]).float()

    @property
    def blank_TD(self) -> Tensor:
        """float32, the empty caption."""
        return self.texts[0]["text"].float()

    def words(self, pick_B: Tensor, generator: torch.Generator) -> Tensor:
        """Which text each of these photos is trained with this time [B]: one of its captions by lot, and of that one of
        its orders. Nothing is drawn where no photo has a choice.
        """
        if not self.choices:
            return self.text_N[pick_B]
        lots = torch.rand(len(pick_B), generator=generator, dtype=torch.float64).tolist()
        return torch.tensor([_by_lot(self.choices[n], lot) for n, lot in zip(pick_B.tolist(), lots, strict=True)])

    def batch(
        self, pick_B: Tensor, blank_B: Tensor | None = None, words_B: Tensor | None = None
    ) -> tuple[Tensor, Conditions]:
        """(latents_BChw, conditions) of these photos, with their first texts unless `words_B` says which; without any
        where `blank_B` is true.
        """
        which_B = self.text_N[pick_B] if words_B is None else words_B
        which_B = which_B if blank_B is None else torch.where(blank_B, 0, which_B)
        given = stacked([self.texts[number] for number in which_B.tolist()])
        return self.latents_NChw[pick_B], given | {"size": self.sizes_N6[pick_B]}


def _by_lot(captions: list[list[int]], lot: float) -> int:
    """lot: in [0, 1); its first part picks the caption, evenly, and what is left of it the order."""
    at = int(lot * len(captions))
    orders = captions[at]
    return orders[int((lot * len(captions) - at) * len(orders))]


def encode(
    partition: Partition,
    base: Path,
    sums: dict[str, str],
    resolution: int,
    cache: Path,
    device: torch.device,
    wording: Wording = AS_WRITTEN,
) -> tuple[Partition, Callable[[tuple[Photo, ...]], Encoded]]:
    """Fill the cache. Returns the partition without undecodable photos, and `rows(photos) -> Encoded`.

    Errors: SITE-01, SITE-02 when too few photos can be decoded; MODEL-06.
    """
    latents, bad = _latents(partition.photos, base, sums, resolution, cache, device)
    partition = partition.without(bad).require(2)
    words = {p.key: wording.texts(p.captions) for p in partition.photos}
    texts, cut = _texts(sorted({"", *_all(words.values())}), base, sums, cache, device)
    partition = _told(partition, words, lambda text: _digest(text) in cut, families.of(base).tokens(base))

    def rows(photos: tuple[Photo, ...]) -> Encoded:
        said = [words[p.key] for p in photos]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(["", *_all(said)]))}
        choices = [[[distinct[text] for text in orders] for orders in captions] for captions in said]
        return Encoded(
            torch.stack([latents[p.key]["latents"] for p in photos]).float(),
            [texts[_digest(text)] for text in distinct],
            torch.tensor([captions[0][0] for captions in choices]),
            torch.stack([latents[p.key]["size"] for p in photos]),
            [p.key for p in photos],
            choices if any(len(captions) > 1 or len(captions[0]) > 1 for captions in choices) else [],
        )

    return partition, rows


def _all(words: Iterable[tuple[tuple[str, ...], ...]]) -> Iterator[str]:
    """Every text of photos, by their captions' orders."""
    return (text for captions in words for orders in captions for text in orders)


def _told(
    partition: Partition,
    words: Mapping[str, tuple[tuple[str, ...], ...]],
    is_cut: Callable[[str], bool],
    tokens: int,
) -> Partition:
    """The partition, which says how many of its captions are longer than what the base model reads."""
    cut = sum(any(map(is_cut, orders)) for photo in partition.photos for orders in words[photo.key])
    return replace(partition, cut=cut, reads=tokens)


def _latents(
    photos: tuple[Photo, ...], base: Path, sums: dict[str, str], resolution: int, cache: Path, device: torch.device
) -> tuple[Rows, Notes]:
    """ "latents" and "size" by the photo's hash, and the reasons of those that cannot be decoded."""
    kept = f"latents-{sums['vae'][:16]}-{resolution}"
    now, rows, bad = f"{kept}-{READING}-{FORM}", Rows(), Notes()
    whole, parts = cache / f"{now}.safetensors", sorted(cache.glob(f"{now}.part*"))
    for path in (whole, *parts):
        some, spoiled = _read(path)
        rows, bad = rows | some, bad | spoiled
    todo = [p for p in photos if p.key not in rows and p.key not in bad]
    for number, (some, spoiled) in enumerate(_encode_photos(todo, base, resolution, device) if todo else ()):
        _write(cache / f"{now}.part-{os.getpid()}-{number}", some, _lasting(spoiled))
        rows, bad = rows | some, bad | spoiled
    if todo or parts:
        keep = {p.key for p in photos}
        lasting = {k: v for k, v in _lasting(bad).items() if k in keep}
        _write(whole, {k: v for k, v in rows.items() if k in keep}, lasting)
        former = (cache / f"{kept}.safetensors", *cache.glob(f"{kept}-{READING}.*"))  # other versions'
        for path in (*cache.glob(f"{now}.*"), *former):
            if path != whole:
                path.unlink(missing_ok=True)
    return rows, bad


def _texts(
    captions: list[str], base: Path, sums: dict[str, str], cache: Path, device: torch.device
) -> tuple[Rows, Notes]:
    """Conditions by the caption's digest, mapped from the file, and which captions are cut."""
    kept = "text-" + "".join(sums[part][:8] for part in families.of(base).words)
    path = cache / f"{kept}-{FORM}.safetensors"
    texts, cut = _read(path)
    if missing := [caption for caption in captions if _digest(caption) not in texts]:
        fresh, too_long = _encode_captions(missing, base, device)
        texts, cut = texts | fresh, cut | too_long
        keep = {_digest(caption) for caption in captions}
        noted = {k: v for k, v in cut.items() if k in keep}
        _write(path, {k: v for k, v in texts.items() if k in keep}, noted)
        for former in (cache / f"{kept}.safetensors", cache / f"{kept}-2.safetensors"):  # other versions'
            former.unlink(missing_ok=True)
        texts, cut = _read(path)
    return texts, cut


def _digest(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def _lasting(bad: Notes) -> Notes:
    return {key: reason for key, reason in bad.items() if reason not in PASSING}


def pixels_of(photo: Photo, resolution: int) -> tuple[Tensor, Tensor]:
    """(pixels [3, H, W] in [-1, 1], sizes and crop [6]), decoded once. Errors: BadImage."""
    image = photo.read()
    return to_pixels(image, resolution), torch.tensor(frame(image.size, resolution))


@torch.no_grad()
def _encode_photos(
    photos: list[Photo], base: Path, resolution: int, device: torch.device
) -> Iterator[tuple[Rows, Notes]]:
    """PART photos and a few at a time: latents and sizes by key, and the reasons of the others."""
    family, vae = families.of(base), model.load(base, "vae").to(device)
    rows, bad, size = Rows(), Notes(), max(1, PIXELS // resolution**2)
    for start in range(0, len(photos), size):
        pixels, sizes = dict[str, Tensor](), dict[str, Tensor]()
        for photo in photos[start : start + size]:
            try:
                pixels[photo.key], sizes[photo.key] = pixels_of(photo, resolution)
            except BadImage as error:
                bad[photo.key] = error.reason
        if pixels:
            z = _finite(family.latents(vae, torch.stack(list(pixels.values())).to(device)), base / "vae")
            encoded = zip(pixels, z.cpu().unbind(), strict=True)
            rows |= {key: {"latents": latent, "size": sizes[key]} for key, latent in encoded}
        done = min(start + size, len(photos))
        if 10 * done // len(photos) > 10 * start // len(photos):  # ten lines, however many photos
            print(f"bouquet: encoded {done}/{len(photos)} photos", flush=True)
        if done == len(photos) or len(rows) + len(bad) >= PART:
            yield rows, bad
            rows, bad = {}, {}


def _finite(numbers: Tensor, part: Path) -> Tensor:
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
    """Conditions by the caption's digest, in the type that the family keeps; and which captions are cut."""
    family, rows = families.of(base), Rows()
    # a language model of billions of parameters is made for 16 bits; a CPU has none to speak of
    dtype = family.reads if device.type == "cuda" else torch.float32
    parts = {part: model.load(base, part, dtype) for part in family.words}
    for part in (part for part in parts if part.startswith("text_encoder")):
        parts[part].to(device)
    length, reader = family.tokens(base), parts[family.reader]
    cut = {_digest(caption): "cut" for caption in _too_long(captions, reader, family.room(reader, length))}
    for start in range(0, len(captions), BATCH):
        some = captions[start : start + BATCH]
        for caption, given in zip(some, family.text(parts, _short(some), length), strict=True):
            rows[_digest(caption)] = {
                name: _finite(value.to(family.kept), base / "text_encoder").cpu() for name, value in given.items()
            }
    return rows, cut


def counted(partition: Partition, base: Path, wording: Wording = AS_WRITTEN) -> Partition:
    """The partition with the captions counted that the base model reads only the beginning of. Errors: MODEL-03."""
    family, words = families.of(base), {p.key: wording.texts(p.captions) for p in partition.photos}
    tokens, reader = family.tokens(base), model.load(base, family.reader)
    cut = set(_too_long(sorted(set(_all(words.values()))), reader, family.room(reader, tokens)))
    return _told(partition, words, cut.__contains__, tokens)


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
            note = file.metadata()
            keys, lengths = json.loads(note["keys"]), json.loads(note["lengths"])
            columns = {name: file.get_tensor(name).split(lengths[name]) for name in lengths}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return dict(zip(keys, rows, strict=True)), json.loads(note["bad"])
    except FileNotFoundError:
        return {}, {}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        print(f"bouquet: {path.name} is damaged, and what it held is encoded again", flush=True)
        return {}, {}


def _write(path: Path, rows: Rows, bad: Notes) -> None:
    """Each name's rows one after another along their first dimension, and how long each is: they may differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    names = list(next(iter(rows.values()), {}))
    lengths = {name: [len(row[name]) for row in rows.values()] for name in names}
    columns = {name: torch.cat([row[name] for row in rows.values()]).contiguous() for name in names}
    note = {"keys": list(rows), "lengths": lengths, "bad": bad}
    save_file(columns, temporary, metadata={key: json.dumps(value) for key, value in note.items()})
    temporary.replace(path)
