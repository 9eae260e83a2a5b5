"""Class images: what a base model itself draws, in a folder that a site puts into its data folder (photos/prior.py).

Enters: prompts, and how many pictures. Leaves: a folder of PNGs with metadata.jsonl, whole or not at all: one prompt
after another, picture i from noise seeded by (seed + i). Runs on the GPU where there is one.
Errors: SITE-09 where something is there, MODEL-01 to -03, MODEL-05, CONFIG-02 for a size or steps out of range.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

from app import bases, files, quiet
from app.adapter import sample
from app.config import RunConfig
from app.errors import SiteError
from app.site.photos import data
from bouquet import progress
from bouquet.data import listing

AT_ONCE = 8  # pictures between two words about how far it is


def draw(config: RunConfig, models: Path, prompts: Sequence[str], count: int, out: Path) -> None:
    """`count` pictures of the prompts by turns; config: base model, resolution, seed and how a sample is drawn."""
    if out.exists() or out.is_symlink():
        fix = "name a folder that is not there yet: --out DIR"
        raise SiteError("SITE-09", found=f"{out} is there already", fix=fix)
    quiet.libraries()
    pipe = sample.plain(bases.locate(config.base_model, models))
    captions = list(islice(cycle(prompts), count))

    def fill(folder: Path) -> None:
        firsts = range(0, count, AT_ONCE)
        for first in progress.steps("drawing", firsts, len(firsts)):
            part = captions[first : first + AT_ONCE]
            for number, image in enumerate(sample.render(pipe, None, part, config, config.seed + first), start=first):
                image.save(folder / name(number))
        listing.write(folder, ((name(number), text) for number, text in enumerate(captions)))

    files.write_folder(out, fill, lambda folder: None)
    print(f"drawn    by {config.base_model}: {data.look(out).report(3)}")


def name(number: int) -> str:
    return f"{number:05}.png"
