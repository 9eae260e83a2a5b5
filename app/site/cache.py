"""Latents and conditions, encoded once for each photo, caption and base model, and kept on the site's disk.

Enters: a partition, a base model's folder and its fingerprint. Leaves: `Encoded` tensors; neither the autoencoder nor
a text encoder stays in memory, and the two are never there at once. A file is keyed by the fingerprint of the parts
that made it (and by which views there are), a row by the photo's hash and view or the caption, so that a changed photo
or model encodes again what changed and nothing else. Photos are written down a few at a time, so that a site that is
killed goes on where it was. What another version wrote is encoded again, and removed.
Errors: MODEL-06 (numbers that are not finite are never kept).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app import families, model
from app.errors import ModelError
from app.families.base import Conditions, stacked
from app.site.photos.captions import MAX_CAPTION
from app.site.photos.data import Partition, Photo
from app.site.photos.images import READING, BadImage, upright
from app.site.photos.views import Plan, Size, View, is_small
from app.site.photos.wording import AS_WRITTEN, Wording
from app.site.shelf import Notes, Rows, read_rows, write_rows

BATCH = 16  # captions encoded at a time
PIXELS = 2 * 128**2  # pixels encoded at a time: 8 at 64, one at 512, where it takes the autoencoder about a gigabyte
PART = 16  # photos that a site encodes again, at most, when it was killed
FORM = 4  # the version of the files
# may be mended without a change to the photo's bytes: tried again every time
PASSING = ("changed", "outside", "unreadable")


@dataclass(frozen=True)
class Encoded:
    """N photos with M distinct texts, in the host's memory: on a GPU a row of text a photo would be gigabytes. A photo
    that is trained on at several resolutions comes once for each.

    latents: float32 [R, C, h, w], or R of them where there are several shapes; texts: the captions' conditions, mapped
    from the cache's file, the empty caption's first; text_N: which of them each photo has, of several the first;
    sizes_R6: sizes and crop (families/base.py); keys: N hashes; choices: where any photo has several texts, those of
    each of its captions; bounds: where a photo has several views, photo n's are rows bounds[n] up to bounds[n + 1], all
    of one shape. `batch` gives the rows of one pass.
    """

    latents: Tensor | list[Tensor]
    texts: list[Conditions]
    text_N: Tensor
    sizes_R6: Tensor
    keys: list[str]
    choices: list[list[list[int]]] = field(default_factory=list)
    bounds: Tensor | None = None

    @classmethod
    def of(cls, latents_NChw: Tensor, text_NTD: Tensor, blank_TD: Tensor, keys: list[str]) -> Encoded:
        """Where each photo has a caption of its own, and no sizes."""
        texts = [{"text": row} for row in (blank_TD, *text_NTD)]
        return cls(latents_NChw, texts, torch.arange(len(keys)) + 1, torch.zeros(len(keys), 6).long(), keys)

    @property
    def latents_NChw(self) -> Tensor:
        """Every row, where all are of one shape."""
        return self.latents if isinstance(self.latents, Tensor) else torch.stack(self.latents)

    @property
    def buckets(self) -> list[Tensor]:
        """The numbers of the photos of each shape."""
        if isinstance(self.latents, Tensor):
            return [torch.arange(len(self.keys))]
        found: dict[torch.Size, list[int]] = {}
        for number, row in enumerate(self._rows(torch.arange(len(self.keys))).tolist()):
            found.setdefault(self.latents[row].shape, []).append(number)
        return [torch.tensor(numbers) for numbers in found.values()]

    def _rows(self, pick_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A row of each of these photos: drawn from its views, or the first."""
        if self.bounds is None:
            return pick_B
        first, count = self.bounds[pick_B], self.bounds.diff()[pick_B]
        if generator is None:
            return first
        return first + (torch.rand(len(pick_B), generator=generator, dtype=torch.float64) * count).long()

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
        self,
        pick_B: Tensor,
        blank_B: Tensor | None = None,
        words_B: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Conditions]:
        """(latents_BChw, conditions) of these photos, which are of one shape: with their first texts unless `words_B`
        says which, without any where `blank_B` is true; a view drawn by `generator`, or the first.
        """
        which_B = self.text_N[pick_B] if words_B is None else words_B
        which_B = which_B if blank_B is None else torch.where(blank_B, 0, which_B)
        given = stacked([self.texts[number] for number in which_B.tolist()])
        rows_B = self._rows(pick_B, generator)
        if isinstance(self.latents, Tensor):
            latents_BChw = self.latents[rows_B]
        else:
            latents_BChw = torch.stack([self.latents[row] for row in rows_B.tolist()])
        return latents_BChw, given | {"size": self.sizes_R6[rows_B]}


def _by_lot(captions: list[list[int]], lot: float) -> int:
    """lot: in [0, 1); its first part picks the caption, evenly, and what is left of it the order."""
    at = int(lot * len(captions))
    orders = captions[at]
    return orders[int((lot * len(captions) - at) * len(orders))]


def encode(
    partition: Partition,
    base: Path,
    sums: dict[str, str],
    plan: Plan,
    cache: Path,
    device: torch.device,
    wording: Wording = AS_WRITTEN,
) -> tuple[Partition, Callable[[tuple[Photo, ...]], Encoded]]:
    """Fill the cache. Returns the partition without undecodable photos, and `rows(photos) -> Encoded`; which views of a
    photo there are is the plan's.

    Errors: SITE-01, SITE-02 when too few photos can be decoded; MODEL-06.
    """
    latents, bad, views = _latents(partition.photos, base, sums, plan, cache, device)
    partition = partition.without(bad).require(2)
    partition = replace(
        partition, enlarged=_enlarged(latents, [_row(p.key, views[p.key][0]) for p in partition.photos])
    )
    words = {p.key: wording.texts(p.captions) for p in partition.photos}
    texts, cut = _texts(sorted({"", *_all(words.values())}), base, sums, cache, device)
    partition = _told(partition, words, lambda text: _digest(text) in cut, families.of(base).tokens(base))

    def rows(photos: tuple[Photo, ...]) -> Encoded:
        # each photo once a shape
        entries = [(p, [*some]) for p in photos for _, some in groupby(views[p.key], lambda view: view.shape)]
        said = [words[p.key] for p, _ in entries]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(["", *_all(said)]))}
        choices = [[[distinct[text] for text in orders] for orders in captions] for captions in said]
        named = [_row(p.key, view) for p, some in entries for view in some]
        each = [latents[name]["latents"].float() for name in named]
        counts = torch.tensor([0, *(len(some) for _, some in entries)])
        return Encoded(
            torch.stack(each) if len({row.shape for row in each}) == 1 else [row.clone() for row in each],
            [texts[_digest(text)] for text in distinct],
            torch.tensor([captions[0][0] for captions in choices]),
            torch.stack([latents[name]["size"] for name in named]),
            [p.key for p, _ in entries],
            choices if any(len(captions) > 1 or len(captions[0]) > 1 for captions in choices) else [],
            counts.cumsum(0) if counts.max() > 1 else None,
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


def _row(key: str, view: View) -> str:
    """A photo's row: by its hash, and by all that its views differ in."""
    return f"{key} {view.height}x{view.width} {view.crop} {'mirrored' if view.mirrored else 'as-it-is'}"


def _enlarged(latents: Rows, names: Iterable[str]) -> int:
    """How many of these rows show a photo that is smaller than what is trained on."""
    sizes = (latents[name]["size"].tolist() for name in names)
    return sum(is_small((width, height), (down, across)) for height, width, _, _, down, across in sizes)


def _sizes(photos: Iterable[Photo], rows: Rows, bad: Notes) -> Callable[[str], Size]:
    """(width, height) by a photo's hash: as it was encoded once, else by its header; who has none goes to `bad`."""
    known = {name.partition(" ")[0]: row["size"].tolist()[1::-1] for name, row in rows.items()}
    by_key = {photo.key: photo for photo in photos}

    def size(key: str) -> Size:
        try:
            return tuple(known[key]) if key in known else upright(by_key[key].load())
        except BadImage as error:
            bad[key] = error.reason
            return 1, 1

    return size


def _latents(
    photos: tuple[Photo, ...], base: Path, sums: dict[str, str], plan: Plan, cache: Path, device: torch.device
) -> tuple[Rows, Notes, dict[str, tuple[View, ...]]]:
    """ "latents" and "size" by a photo's hash and view, the reasons of the photos that cannot be decoded, and the views
    of each.
    """
    kept = f"latents-{sums['vae'][:16]}-{plan.name}"
    now, rows, bad = f"{kept}-{READING}-{FORM}", Rows(), Notes()
    whole, parts = cache / f"{now}.safetensors", sorted(cache.glob(f"{now}.part*"))
    for path in (whole, *parts):
        some, spoiled = read_rows(path)
        rows, bad = rows | some, bad | spoiled
    views = plan.views([p.key for p in photos if p.key not in bad], _sizes(photos, rows, bad))
    lacks = {p.key: [view for view in views.get(p.key, ()) if _row(p.key, view) not in rows] for p in photos}
    todo = [(p, lacks[p.key]) for p in photos if lacks[p.key] and p.key not in bad]
    for number, (some, spoiled) in enumerate(_encode_photos(todo, base, device) if todo else ()):
        write_rows(cache / f"{now}.part-{os.getpid()}-{number}", some, _lasting(spoiled))
        rows, bad = rows | some, bad | spoiled
    if todo or parts:
        keep = {_row(key, view) for key, some in views.items() for view in some}
        keys = {p.key for p in photos}
        lasting = {k: v for k, v in _lasting(bad).items() if k in keys}
        write_rows(whole, {k: v for k, v in rows.items() if k in keep}, lasting)
        former = (cache / f"{kept}.safetensors", *cache.glob(f"{kept}-{READING}.*"))  # other versions'
        for path in (*cache.glob(f"{now}.*"), *former):
            if path != whole:
                path.unlink(missing_ok=True)
    return rows, bad, views


def _texts(
    captions: list[str], base: Path, sums: dict[str, str], cache: Path, device: torch.device
) -> tuple[Rows, Notes]:
    """Conditions by the caption's digest, mapped from the file, and which captions are cut."""
    kept = "text-" + "".join(sums[part][:8] for part in families.of(base).words)
    path = cache / f"{kept}-{FORM}.safetensors"
    texts, cut = read_rows(path)
    if missing := [caption for caption in captions if _digest(caption) not in texts]:
        fresh, too_long = _encode_captions(missing, base, device)
        texts, cut = texts | fresh, cut | too_long
        keep = {_digest(caption) for caption in captions}
        noted = {k: v for k, v in cut.items() if k in keep}
        write_rows(path, {k: v for k, v in texts.items() if k in keep}, noted)
        for former in (cache / f"{kept}{end}.safetensors" for end in ("", "-2", "-3")):  # other versions'
            former.unlink(missing_ok=True)
        texts, cut = read_rows(path)
    return texts, cut


def _digest(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def _lasting(bad: Notes) -> Notes:
    return {key: reason for key, reason in bad.items() if reason not in PASSING}


def pixels_of(photo: Photo, views: list[View]) -> list[tuple[Tensor, Tensor]]:
    """(pixels [3, H, W] in [-1, 1], sizes and crop [6]) of each view, decoded once. Errors: BadImage."""
    image = photo.read()
    return [(view.pixels(image, photo.key), torch.tensor(view.frame(image.size, photo.key))) for view in views]


def a_pass(pixels: int) -> int:
    """How many pictures of so many pixels are encoded at a time."""
    return max(1, PIXELS // pixels)


@torch.no_grad()
def _encode_photos(
    photos: list[tuple[Photo, list[View]]], base: Path, device: torch.device
) -> Iterator[tuple[Rows, Notes]]:
    """PART photos and a few at a time: latents and sizes by photo and view, and the reasons of the others."""
    family, vae = families.of(base), model.load(base, "vae").to(device)
    rows, bad = Rows(), Notes()
    size = a_pass(max(view.height * view.width for _, views in photos for view in views))
    for start in range(0, len(photos), size):
        shapes = dict[torch.Size, dict[str, tuple[Tensor, Tensor]]]()
        for photo, views in photos[start : start + size]:
            try:
                for view, pair in zip(views, pixels_of(photo, views), strict=True):
                    shapes.setdefault(pair[0].shape, {})[_row(photo.key, view)] = pair
            except BadImage as error:
                bad[photo.key] = error.reason
        for some in (part for pairs in shapes.values() for part in _parts(pairs, size)):
            pixels = torch.stack([pair[0] for pair in some.values()])
            z = _finite(family.latents(vae, pixels.to(device)), base / "vae")
            encoded = zip(some.items(), z.cpu().unbind(), strict=True)
            rows |= {name: {"latents": latent, "size": pair[1]} for (name, pair), latent in encoded}
        done = min(start + size, len(photos))
        if 10 * done // len(photos) > 10 * start // len(photos):  # ten lines, however many photos
            print(f"bouquet: encoded {done}/{len(photos)} photos", flush=True)
        if done == len(photos) or len(rows) + len(bad) >= PART:
            yield rows, bad
            rows, bad = {}, {}


def _parts(pairs: dict[str, tuple[Tensor, Tensor]], size: int) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    names = list(pairs)
    return ({name: pairs[name] for name in names[start : start + size]} for start in range(0, len(names), size))


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
