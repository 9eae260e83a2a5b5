"""Does an adapter draw photos it was trained on? A site's photos and a run in; distances, and nothing else, out.

Each sample is drawn from the caption of a training photo. Pictures and photos are compared in the latents of the base
model's own autoencoder, which knows no captions. A picture's number is its distance to the nearest training photo over
its mean distance to the next NEIGHBOURS nearest: a picture near to everything, a blurred one, has a number near 1, a
copy of one photo one near 0. Held-out photos, which nobody trained on, have the same number: theirs say what is
ordinary at this site. Where photos are private, counts leave as a run tells them, and no distance of fewer held-out
photos than a loss may be told of (bouquet/worth.py).
Source: Carlini et al. 2023, Extracting Training Data from Diffusion Models, arXiv:2301.13188, section 5.1.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from app.adapter.sample import Pipeline
from app.site import budget
from app.site.limits import Limits
from app.site.photos.wording import Wording
from app.site.privacy import Privacy
from bouquet.report.memorisation import SiteMemory

One = TypeVar("One")
NEIGHBOURS = 50
SPACE = "latents of the base model's autoencoder"


def numbers(rows_ND: torch.Tensor, photos_MD: torch.Tensor, neighbours: int = NEIGHBOURS) -> list[float]:
    """For each of N rows: distance to the nearest of M photos over the mean distance to the next `neighbours` (fewer:
    all others).
    """
    far = torch.cdist(rows_ND.double(), photos_MD.double()).sort(dim=1).values[:, : neighbours + 1]
    return (far[:, 0] / far[:, 1:].mean(dim=1)).tolist()


@torch.no_grad()
def latents(pipe: Pipeline, images: Sequence[Image.Image]) -> torch.Tensor:
    """float32 [N, D]: each picture as the cache encodes photos, flattened."""
    import numpy as np

    from app.adapter import sample

    pixels = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1 for image in images]
    rows = [sample.family_of(pipe).latents(pipe.vae, one[None].to(pipe.device)) for one in pixels]
    return torch.cat(rows).flatten(1)


def look(name: str, folder: Path, run: Path, models: Path, cached: Path, count: int) -> SiteMemory:
    """One site's column of memory.json: sorted, so that no number belongs to a photo. Errors: WORTH-04, and those of
    getting a site ready.
    """
    from app import bases, model
    from app.adapter import formats, sample
    from app.site import train
    from bouquet import worth

    adapter, config = formats.open_adapter(run, models=models)
    config = replace(config, resolutions="", aspect_buckets=False, random_crops=0)  # the squares of the pictures
    own, promise = Limits.read(os.environ.get("SITE_LIMITS", "")), budget.of(os.environ, cached)
    site = train.Site(config, models, folder, cached, "", limits=own, promise=promise)
    worth.check_told(site, own)
    chosen = some(site.photos, min(count, site.told), site.privacy, config.seed)
    pipe = sample.pipeline(bases.locate(config.base_model, models), config)
    wording = Wording.of(config)
    texts = [wording.texts(photo.captions)[0][0] for photo in chosen]
    drawn = sample.render(pipe, adapter, texts, replace(config, sample_prompts=""))
    known = site.train.latents_NChw.flatten(1)
    others = site.held_out.latents_NChw.flatten(1)
    others = others[some(range(len(others)), len(others), site.privacy, config.seed)]
    held_out, samples = (
        tuple(sorted(site.privacy.number(round(value, 5)) for value in numbers(rows, known)))
        for rows in (others, latents(pipe, drawn))
    )
    return SiteMemory(
        photos=site.told,
        space=SPACE,
        samples=samples,
        held_out=held_out,
        run=run.resolve().name,
        adapter=model.adapter_hash(adapter),
        seed=config.seed,
        site=name,
    )


def some(of: Sequence[One], most: int, privacy: Privacy, seed: int) -> list[One]:
    """At most `most` of these, drawn by the seed, in a number that tells how many there are no better than the site
    does: a list's length is a count as well.
    """
    return random.Random(seed).sample(of, min(most, int(privacy.number(len(of)))))
