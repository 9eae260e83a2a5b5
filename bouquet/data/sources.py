"""The hub's data sets, for bouquet data partition: a name or folder in; each site's encoded pictures and captions out.

Enters: a data set that `datasets` can load, with an image column and text, caption or label. Leaves: a function from
site number (from 1) to (encoded picture, caption) pairs, with the captions that a site would give the same rows itself.
Nothing is decoded or re-encoded.
Errors: SITE-04, SITE-05, SITE-08, SITE-10.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.errors import SiteError
from app.site.photos.captions import LABEL_TEMPLATE, TEXTS, checked_template, fill, several
from app.site.photos.images import BadImage
from app.site.photos.tables import class_name

Caption = str | list[str] | None  # or several
Sample = tuple[Callable[[], bytes], Caption]  # gives the encoded picture or raises BadImage; caption


@dataclass(frozen=True)
class Division:
    """What is divided, and how: the command's options, as its help says them."""

    dataset: str
    sites: int
    out: Path
    images_per_site: int | None = None
    seed: int = 0
    caption_template: str | None = None
    by: str = "iid"
    alpha: float = 0.5
    public: bool = False
    split: str = "train"


@contextmanager
def dataset_samples(asked: Division) -> Iterator[Callable[[int], Iterator[Sample]]]:
    """A function from site number to that site's samples, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as scratch:
        dataset = load(asked, scratch)
        captions = captioner(dataset, asked)
        part = divide(dataset, asked)
        yield lambda site: samples_of(part(site - 1), captions, asked)


def load(asked: Division, scratch: str) -> Any:
    """The data set, shuffled, its pictures not decoded; a folder's never touches the network. Errors: SITE-08."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "FLWR_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    local = Path(asked.dataset).is_dir()
    os.environ.update(quiet | ({"HF_HUB_OFFLINE": "1"} if local else {}))
    if not local and asked.dataset.startswith(("/", ".", "~")):
        raise load_error(asked, "no such folder")
    import datasets

    datasets.disable_progress_bars()
    cache = scratch if local else None  # what comes over the network stays in the hub's own cache
    try:
        name = str(Path(asked.dataset).resolve()) if local else asked.dataset
        dataset = datasets.load_dataset(name, split=asked.split, cache_dir=cache)
        image = column(dataset, "image", datasets.Image)
        if isinstance(dataset.features.get(image), datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # not found, no network, no such split, a damaged file: `datasets` has no common base
        raise load_error(asked, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from None
    if image is None:
        raise load_error(asked, f"no image column among {dataset.column_names}")
    return dataset.shuffle(seed=asked.seed)


def load_error(asked: Division, found: str) -> SiteError:
    found = f"{asked.dataset}, split {asked.split}: {found}"
    fix = "check the name and the network, or give a folder with the data set's parquet files"
    return SiteError("SITE-08", found=found, fix=fix)


def column(dataset: Any, name: str, kind: type) -> str | None:
    """The column of that name, else the first of that feature type."""
    of_kind = [key for key, feature in dataset.features.items() if isinstance(feature, kind)]
    return name if name in dataset.features else of_kind[0] if of_kind else None


def divide(dataset: Any, asked: Division) -> Callable[[int], Any]:
    """A function from partition number (from 0) to its rows. Errors: SITE-10."""
    import datasets
    import numpy as np
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    label = column(dataset, "label", datasets.ClassLabel)
    if asked.by in ("dirichlet", "label") and label is None:
        raise divide_error(f"no label column among {dataset.column_names}", "divide it with --by iid")
    try:
        if asked.by == "label":  # Flower's PathologicalPartitioner lets sites share classes; here they don't
            classes, labels = sorted(dataset.unique(label)), np.array(dataset[label])
            groups = np.array_split(classes, asked.sites)
            return lambda index: dataset.select(np.flatnonzero(np.isin(labels, groups[index])))
        partitioner = IidPartitioner(asked.sites)
        if asked.by == "dirichlet":
            skew = {"alpha": asked.alpha, "min_partition_size": 2, "seed": asked.seed}
            partitioner = DirichletPartitioner(asked.sites, label, **skew)
        partitioner.dataset = dataset
        partitioner.load_partition(0)
    except (ValueError, IndexError) as error:
        raise divide_error(str(error), "ask for fewer --sites, or a larger --alpha") from None
    load: Callable[[int], Any] = partitioner.load_partition
    return load


def divide_error(found: str, fix: str) -> SiteError:
    return SiteError("SITE-10", found=found, fix=fix)


def captioner(dataset: Any, asked: Division) -> Callable[[dict[str, Any]], Caption]:
    """A function from row to its caption, or captions: the text column, or the template over the class name. Errors:
    SITE-04.
    """
    import datasets

    label = column(dataset, "label", datasets.ClassLabel)
    text = [name for name in TEXTS if name in dataset.features] if asked.caption_template is None else []
    template = checked_template(asked.caption_template or LABEL_TEMPLATE)
    if label is None and "{label}" in template and not text:
        found = f"no text, caption, prompt or label column among {dataset.column_names}"
        fix = 'give one caption for all: --caption-template "a photo of a flower"'
        raise SiteError("SITE-04", found=found, fix=fix)
    names = getattr(dataset.features.get(label), "names", None) or []

    def caption(row: dict[str, Any]) -> Caption:
        words = class_name(row.get(label) if label else None, names)
        said = next(filter(None, (several(row[name]) for name in text)), ())
        if len(said) > 1:
            return list(said)
        return said[0] if said else (fill(template, words) if words or not text else None)

    return caption


def samples_of(part: Any, caption: Callable[[dict[str, Any]], Caption], asked: Division) -> Iterator[Sample]:
    """The rows of one part, in their shuffled order."""
    import datasets

    image = column(part, "image", datasets.Image)
    for row in part.select(range(min(len(part), asked.images_per_site or len(part)))):
        yield partial(encoded, row[image]), caption(row)


def encoded(value: Any) -> bytes:
    """The bytes of a picture column's value: plain, in a struct, or in the file that it names. Errors: BadImage."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if "://" in value[:20]:
            raise BadImage("address")
        try:
            return Path(value).read_bytes()
        except (OSError, ValueError):
            raise BadImage("absent") from None
    if value and not isinstance(value, bytes):
        raise BadImage("not-a-picture")
    return value or b""  # which is counted as "empty"
