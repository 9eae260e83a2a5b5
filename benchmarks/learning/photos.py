"""Photos for the methods' table: what each site has of which kind, and photos that nobody trains on, by their kind.

disjoint: two sites of the demo, each with two species that the base has never seen, one photo in five of a known one.
own: the same without the known ones. class-images: own, and the known ones as class images.
dirichlet: four sites among which the four new species are divided by Dirichlet(0.1) (flwr-datasets' partitioner, Hsu et
al. 2019, arXiv:1909.06335), one photo in five of a known one. real: photographs of flowers, five classes a site.
Enters: a folder, a seed, how many photos. Leaves: `Setting`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bouquet.data.sources import Division, divide
from models.mini import draw
from models.mini.learned import SEED, Pictures, drawn, write

NEW = (*draw.UNSEEN[1], *draw.UNSEEN[2])
ALPHA, SITES = 0.1, 4
CLASSES = 5  # of photographs, a site


@dataclass(frozen=True)
class Setting:
    """shares: what part of each site's photos, of new kinds alone, is of which kind. held_out: photos by kind."""

    folders: list[Path]
    shares: list[dict[str, float]]
    held_out: dict[str, Path]


def disjoint(home: Path, seed: int, count: int, held_out: int, common: str = "photos") -> Setting:
    """common: whether known species are among the photos, class images, or nowhere ("")."""
    folders = []
    for site, own in draw.UNSEEN.items():
        mine = draw.photos(own, count, seed * 1000 + site)
        known = draw.photos(draw.KNOWN, count // 2, seed * 1000 + site + 500) if common == "class-images" else ()
        pictures = draw.site_photos(site, count, seed) if common == "photos" else mine
        folders.append(write(home / f"disjoint-{common or 'own'}-{seed}-{count}" / f"site-{site}", pictures, known))
    return Setting(
        folders, [dict.fromkeys(own, 1 / len(own)) for own in draw.UNSEEN.values()], drawn(home / "drawn", held_out)
    )


def divided(kinds: list[str], sites: int, alpha: float, seed: int) -> list[list[int]]:
    """Which of the rows, each of a kind, every site gets."""
    import datasets

    names = sorted(set(kinds))
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "row": datasets.Value("int64")})
    rows: dict[str, Any] = {"label": [names.index(kind) for kind in kinds], "row": list(range(len(kinds)))}
    asked = Division("", sites, Path(), seed=seed, by="dirichlet", alpha=alpha)
    with warnings.catch_warnings():  # of a division that was drawn again, as a site of it had fewer than two photos
        warnings.simplefilter("ignore", UserWarning)
        part = divide(datasets.Dataset.from_dict(rows, features=features), asked)
    return [list(part(site)["row"]) for site in range(sites)]


def dirichlet(home: Path, seed: int, count: int, held_out: int) -> Setting:
    """`count` photos a site on average, by one division for every seed: a seed draws the photos and trains."""
    all_, folders, shares = draw.photos(NEW, SITES * count * 4 // 5, seed * 1000), [], []
    kinds = [NEW[number % len(NEW)] for number in range(len(all_))]
    for site, rows in enumerate(divided(kinds, SITES, ALPHA, SEED), 1):
        common = draw.photos(draw.KNOWN, max(4, len(rows) // 4), seed * 1000 + site)
        pictures = [all_[row] for row in rows] + common
        folders.append(write(home / f"dirichlet-{seed}-{count}" / f"site-{site}", pictures))
        shares.append({kind: number / len(rows) for kind, number in Counter(kinds[row] for row in rows).items()})
    return Setting(folders, shares, drawn(home / "drawn", held_out))


def real(home: Path, seed: int, count: int, held_out: int, source: Path) -> Setting:
    """The ten classes with the most photos, every other one each site's; those of the split `test` are held out."""
    import datasets

    datasets.disable_progress_bars()
    splits = datasets.load_dataset(str(source), cache_dir=str(home / "datasets"))
    names = splits["train"].features["label"].names
    kinds = [f"photo of a {name}" for name in names]  # a rose that is drawn is another kind
    most = [label for label, _ in Counter(splits["train"]["label"]).most_common(2 * CLASSES)]
    own, aside = [most[site::2] for site in range(2)], drawn(home / "drawn", held_out, draw.KNOWN)

    def pictures(split: str, labels: list[int], number: int) -> Pictures:
        some = splits[split].shuffle(seed=seed if split == "train" else SEED)
        rows = [row for row, label in enumerate(some["label"]) if label in labels][:number]
        return ((some[row]["image"], f"a {kinds[some[row]['label']]}") for row in rows)

    folders = [
        write(home / f"real-{seed}-{count}" / f"site-{site}", pictures("train", labels, count))
        for site, labels in enumerate(own, 1)
    ]
    for label in most:
        aside[kinds[label]] = write(home / f"photographs/{label}-{held_out}", pictures("test", [label], held_out))
    shares = [{kinds[label]: 1 / CLASSES for label in labels} for labels in own]
    return Setting(folders, shares, aside)
