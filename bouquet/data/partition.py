"""Divide a data set among sites: a name in; site-1 ... site-N out, each an imagefolder with metadata.jsonl.

  bouquet data partition --dataset mini --sites 2
  bouquet data partition --dataset path/to/flowers --out .bouquet/flowers --images-per-site 500
  bouquet data partition --dataset nkirschi/oxford-flowers --by dirichlet --caption-template "a photo of a {label}"

Run it again with the same arguments and nothing happens; a folder with other content is refused, never mixed. Each
site's folder appears whole or not at all, with partition.json saying what it was made from, and holds what a site reads
of it: what a site would set aside (a picture that cannot be read, has no caption, or is there already) is counted and
left out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from app.errors import SiteError
from app.site.photos.captions import checked_template
from app.site.photos.data import scan
from app.site.photos.images import FORMATS, BadImage, check, kind
from app.site.privacy import PUBLIC_LIST, declare_public
from bouquet import progress
from bouquet.data import listing
from bouquet.data.sources import Division, Sample, dataset_samples

MINI_IMAGES = 200  # mini draws as many as it is asked for


def divide(asked: Division) -> None:
    """Make the sites' folders, and say what comes next."""
    print(
        "next     flwr run . remote-deployment --stream"
        if partition(asked)
        else "nothing to do: the same partition is there"
    )


def partition(asked: Division) -> bool:
    """Make the missing sites; say whether there were any. Errors: SITE-04, SITE-05, SITE-08 to SITE-11."""
    wanted = {asked.out / f"site-{number}": recipe(asked, number) for number in range(1, asked.sites + 1)}
    missing = [folder for folder, made_from in wanted.items() if not already(folder, made_from)]
    if missing:
        with mini_samples(asked) if asked.dataset == "mini" else dataset_samples(asked) as samples:
            for folder in missing:
                write(folder, wanted[folder], samples(wanted[folder]["site"]), asked.public or asked.dataset == "mini")
    for folder in wanted:
        counts = json.loads((folder / "partition.json").read_text())["counts"]
        aside = "".join(f", {count} {reason}" for reason, count in counts.items() if reason != "images")
        kept = "" if folder in missing else "   (kept)"
        print(f"{folder.name:<8} {counts['images']:>6} images{aside}   {folder}{kept}")
    return bool(missing)


def recipe(asked: Division, site: int) -> dict[str, Any]:
    """What a site's folder is made from. Mini's sites don't depend on how many there are, so one more may join them."""
    common = {"dataset": asked.dataset, "site": site, "seed": asked.seed, "images_per_site": asked.images_per_site}
    if asked.dataset == "mini":
        return common | {"images_per_site": asked.images_per_site or MINI_IMAGES}
    name = str(Path(asked.dataset).resolve()) if Path(asked.dataset).is_dir() else asked.dataset
    template = checked_template(asked.caption_template) if asked.caption_template is not None else None
    ours = {"dataset": name, "sites": asked.sites, "split": asked.split, "by": asked.by, "caption_template": template}
    return common | ours | ({"alpha": asked.alpha} if asked.by == "dirichlet" else {})


def already(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether this very partition is there, whole. Errors: SITE-09 when something else is."""
    if not folder.exists():
        return False
    fix = f"choose another --out, or remove it first: rm -r {folder}"
    try:
        there = json.loads((folder / "partition.json").read_text())
        files = {path.name for path in folder.iterdir()} - {listing.LIST, "partition.json", PUBLIC_LIST}
        counts = there.pop("counts")
        lines = (folder / listing.LIST).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        listed = {json.loads(line)["file_name"] for line in lines}
    except (OSError, ValueError, KeyError):
        found = f"{folder} was not made by this command"
        raise SiteError("SITE-09", found=found, fix=fix) from None
    if there != made_from:
        different = ", ".join(sorted(k for k in there.keys() | made_from.keys() if there.get(k) != made_from.get(k)))
        found = f"{folder} was made with other settings: {different}"
        raise SiteError("SITE-09", found=found, fix=fix)
    if files != listed or len(files) != counts["images"]:
        found = f"{folder} was changed since: {len(files)} files for {counts['images']} images"
        raise SiteError("SITE-09", found=found, fix=fix)
    return True


def write(folder: Path, made_from: dict[str, Any], samples: Iterable[Sample], public: bool) -> None:
    """Fill the folder beside its place, then move it there; pictures keep their bytes. Errors: SITE-11 fewer than 2.

    public: say of these photos that everybody has them, so that the site's figures can be repeated
    (app/site/privacy.py).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts: Counter[str] = Counter(images=0)
    keys: set[str] = set()
    with (partial / listing.LIST).open("w", encoding="utf-8") as lines:
        for load, caption in progress.steps(folder.name, samples, made_from["images_per_site"]):
            try:
                data = load()
                check(data)
                if not caption:
                    raise BadImage("no-caption")
                if (key := hashlib.sha256(data).hexdigest()) in keys:
                    raise BadImage("duplicate")
            except BadImage as bad:
                counts[bad.reason] += 1
                continue
            keys.add(key)
            counts["images"] += 1
            name = f"{counts['images']:04}.{FORMATS[kind(data[:16])]}"
            (partial / name).write_bytes(data)
            lines.write(listing.line(name, caption))
    if counts["images"] < 2:
        shutil.rmtree(partial)
        found = f"{counts['images']} images for {folder.name}: {dict(counts)}"
        fix = "ask for fewer --sites, or divide with --by iid"
        raise SiteError("SITE-11", found=found, fix=fix)
    (partial / "partition.json").write_text(json.dumps(made_from | {"counts": counts}, indent=2) + "\n")
    if public:
        declare_public(partial, scan(partial).photos)
    partial.rename(folder)


@contextmanager
def mini_samples(asked: Division) -> Iterator[Callable[[int], Iterator[Sample]]]:
    """A function from site number to the flowers drawn for it, as PNG."""
    from models.mini.draw import site_photos

    def draw(site: int) -> Iterator[Sample]:
        for image, caption in site_photos(site, asked.images_per_site or MINI_IMAGES, asked.seed):
            png = BytesIO()
            image.save(png, "PNG")
            yield png.getvalue, caption

    yield draw
