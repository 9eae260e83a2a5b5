"""Train mini in one process, and see what it has learned: a federation without a network, losses by species, the judge.

Enters: sites as the app has them, and the run's config. Leaves: the net after all rounds, trained by the app's own
steps and averaged by the hub's own strategy; its loss at fixed noise on folders of photos that nobody trained on; and
how many drawn pictures the judge sees the right species in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from app import families, model
from app.adapter import sample
from app.config import RunConfig
from app.hub import guard
from app.hub.strategy import Strategy
from app.model import Adapter, Net
from app.site import cache, diffusion, privacy, train
from app.site.photos import data
from app.site.photos.folders import CLASS
from app.site.photos.views import Plan
from bouquet import worth
from bouquet.data import listing
from models.mini import draw
from models.mini.judge import judge

SEED = 20261128  # of the drawings that nobody trains on
Pictures = Iterable[tuple[Image.Image, str]]
Average = Callable[[int, list[guard.Reply], Adapter], Adapter]  # as Strategy.aggregate


def federated(
    sites: Sequence[train.Site],
    config: RunConfig,
    average: Average | None = None,
    before: Callable[[Net, int], None] = lambda net, number: None,
) -> Net:
    """All rounds of these sites, on the first one's net, which is returned with the last adapter on it.

    One site is a training without a hub. average: in place of the run's strategy. before: what is done to the net
    before a site's steps of a round.
    """
    net, average = sites[0].net, average or Strategy(config).aggregate
    adapter = model.adapter_of(net)
    for number in range(1, config.rounds + 1):
        replies = []
        for site in sites:
            model.apply_adapter(net, adapter)
            before(net, number)
            seed, one = site.privacy.seed(config.seed, site.folder.name, number), train.accelerator(config)
            train.fit(net, site.objective, site.train, config, one, seed, number, site.prior)
            replies.append(guard.Reply(site.folder.name, model.adapter_of(net), site.told, {}))
        adapter = average(number, guard.weigh(replies, {}, config.largest_share), adapter)
    model.apply_adapter(net, adapter)
    return net


# --- photos -----------------------------------------------------------------------------------------------------------


def once(target: Path, fill: Callable[[Path], object]) -> Path:
    """The folder that `fill` makes of a path, once, whole or not at all."""
    if not target.exists():
        shutil.rmtree(beside := target.with_name(f".{target.name}"), ignore_errors=True)
        fill(beside)
        beside.rename(target)
    return target


def write(folder: Path, pictures: Pictures, classes: Pictures = ()) -> Path:
    """A site's folder; everybody may have these photos. classes: its class images."""

    def fill(beside: Path) -> None:
        found = list(_fill(beside, pictures))
        found += _fill(beside / CLASS, classes) if classes else ()
        privacy.declare_public(beside, found)

    return once(folder, fill)


def with_classes(folder: Path, target: Path, classes: Path) -> Path:
    """A copy of a site's folder with these class images."""

    def fill(beside: Path) -> None:
        shutil.copytree(folder, beside)
        shutil.copytree(classes, beside / CLASS)
        privacy.declare_public(beside, (*data.look(beside).photos, *data.look(beside / CLASS).photos))

    return once(target, fill)


def _fill(folder: Path, pictures: Pictures) -> tuple[data.Photo, ...]:
    folder.mkdir(parents=True)
    captions = []
    for number, (image, caption) in enumerate(pictures):
        image.save(folder / f"{number:05}.png")
        captions.append((f"{number:05}.png", caption))
    listing.write(folder, captions)
    return data.look(folder).photos


def pooled(folders: Sequence[Path], target: Path) -> Path:
    """All photos in one folder."""
    return once(target, lambda beside: worth.together(list(folders), beside))


def drawn(home: Path, count: int, species: Sequence[str] = draw.SPECIES) -> dict[str, Path]:
    """So many photos of each species, the same for everybody, to measure on."""
    folders = {name: home / f"{name}-{count}" for name in species}
    for name, folder in folders.items():
        if not folder.exists():
            write(folder, draw.photos((name,), count, SEED + draw.SPECIES.index(name)))
    return folders


# --- what was learned -------------------------------------------------------------------------------------------------


def losses(net: Net, folders: Mapping[str, Path], config: RunConfig, base: Path, home: Path) -> dict[str, float]:
    """Of the net on each folder's photos, over fixed noise; what was encoded of them is kept in `home`."""
    objective, plan, device = diffusion.Objective.of(base), Plan.of(config, families.of(base).multiple), net.device
    found = {}
    net.eval()
    for name, folder in folders.items():
        cached = home / f"encoded-{folder.name}"
        partition = data.scan(folder, memory=cached)
        partition, rows = cache.encode(partition, base, model.fingerprint(base, cached), plan, cached, device)
        found[name] = diffusion.validation_loss(
            net, objective, rows(partition.photos), device, timesteps=config.validation_timesteps, batch_size=64
        )
    return found


def prompts(species: str, count: int) -> list[str]:
    rng = np.random.default_rng(sum(species.encode()))
    choose = lambda names: str(rng.choice(list(names)))  # noqa: E731
    return [draw.caption(species, choose(draw.COLOURS), choose(draw.BACKGROUNDS)) for _ in range(count)]


def right(
    pipe: Any, adapter: Adapter | None, config: RunConfig, count: int, species: Iterable[str], seed: int = 1000
) -> dict[str, int]:
    """In how many of `count` pictures the judge sees the species that was asked for."""
    found = {}
    for name in species:
        images = sample.render(pipe, adapter, prompts(name, count), config, seed=seed)
        found[name] = sum(seen == name for seen in judge(images))
    return found


def pipeline(net: Net, base: Path) -> Any:
    """The base model's, with this net in place of its own."""
    pipe = sample.plain(base, torch.device("cpu"))
    pipe.unet = net.eval()
    return pipe
