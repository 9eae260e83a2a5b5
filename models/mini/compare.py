"""Was joining worth it? Base, each site alone, federated and pooled, over seeds, by the same photos and prompts.

    python -m models.mini.compare --run .bouquet/adapters/latest --data .bouquet/data --seeds 42 43 44
    python -m models.mini.compare ... --contenders base federated "federated, rounds=16 batch-size=8"

Enters: finished runs of the demo, alike but for their seed, and its two sites' photos. Leaves: `comparison.json`,
`comparison.md` and `comparison.png` (the README's picture) in `--out`, and the README's table between its marks.
For every seed, "alone" takes as many steps on one site's photos as a site takes in the run, "pooled, same steps" as
many on both sites' photos in one place, "pooled, all steps" as many as both sites together. A seed that no run is given
of is federated here, in one process, by the hub's own averaging. All by the runs' learning rate over their own steps.
A contender may be `federated` with other keys of the run's config, class images drawn by the base model where they ask
for some, or `site 1 personal`: the federated adapter, trained on at that site, as `bouquet site personal` does it.
Each training and each row is kept in `--work` as soon as it is there: who is interrupted goes on with the next.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from flwr.common.config import parse_config_args
from safetensors.torch import load_file, save_file

from app import files, model
from app.adapter import sample, store
from app.config import RunConfig
from app.site import train
from app.site.photos.folders import CLASS
from benchmarks import pages
from bouquet import ROOT, worth
from bouquet.adapter import personal
from bouquet.data import classes
from models.mini import draw, learned

HERE = Path(__file__).parent
BASE, FEDERATED = "base", "federated"
CONTENDERS = (BASE, "site 1 alone", "site 2 alone", FEDERATED, "pooled, same steps", "pooled, all steps")
PERSONAL = ("site 1 personal", "site 2 personal")
NEW = (*draw.UNSEEN[1], *draw.UNSEEN[2])
DRAWINGS = 3  # times `--count` pictures of a species, each from noise of its own
HELD_OUT = 24  # drawn photos of each known species, to measure on
CLASSES = 112  # pictures that the base model draws, where a contender has class images
NORMAL = 1.96
MARK = "comparison"  # in the page
PICTURED = (
    "a red tulip, meadow background",
    "a yellow daisy, night background",
    "a red poppy, meadow background",
    "a white lily, night background",
)
PICTURED += ("a pink lotus, sky background", "a purple thistle, sand background")


@dataclass(frozen=True)
class Row:
    """What one contender of one seed has learned. known: loss on the known species. held_out: on each site's photos
    that it held out, as its site measures it; which they are follows from the seed. right: of `pictures` of a new
    species, how many the judge sees it in; where nothing was drawn there are 0.
    """

    contender: str
    seed: int
    known: float
    held_out: list[float]
    right: dict[str, int]
    pictures: int


# --- trainings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """folders: the two sites'. runs: by seed, of those that were given. config: theirs, but for the seed. count: of
    pictures a species and drawing; 0 is no judge. models: the folder with the base model. contenders: what is compared.
    """

    folders: list[Path]
    runs: dict[int, Path]
    config: RunConfig
    work: Path
    count: int
    models: Path
    contenders: tuple[str, ...] = CONTENDERS

    def of(self, seed: int) -> RunConfig:
        return replace(self.config, seed=seed)

    def told(self, contender: str, seed: int) -> RunConfig:
        """With the keys that a name says after `federated, `. Errors: CONFIG-01, -02."""
        keys = contender.removeprefix(f"{FEDERATED}, ")
        mine = {key.replace("_", "-"): value for key, value in asdict(self.of(seed)).items()}
        return RunConfig.read(mine | (parse_config_args([keys]) if keys != contender else {}))

    def sites(self, config: RunConfig, folders: Sequence[Path]) -> list[train.Site]:
        if config.prior_loss_weight:
            folders = self.with_classes(folders)
        return [train.Site(config, self.models, folder, self.work / f"cache-{folder.name}", "") for folder in folders]

    def with_classes(self, folders: Sequence[Path]) -> list[Path]:
        """Copies of them, of the same names, with class images of what the base model knows, which it draws itself."""
        drawn = self.work / "classes" / CLASS
        if not drawn.exists():
            asked = [draw.caption(*words) for words in itertools.product(draw.KNOWN, draw.COLOURS, draw.BACKGROUNDS)]
            every = len(asked) // CLASSES
            classes.draw(replace(self.config, seed=1000), self.models, asked[::every], CLASSES, drawn)
        return [learned.with_classes(folder, drawn.with_name(folder.name), drawn) for folder in folders]

    def adapter(self, contender: str, seed: int) -> model.Adapter:
        """As it was trained, once."""
        if contender == FEDERATED and seed in self.runs:
            return store.read_adapter(self.runs[seed] / "final")
        kept = self.work / f"{re.sub('[^a-z0-9.=]+', '-', contender)}-{seed}.safetensors"
        if not kept.exists():
            print(f"training: {contender}, seed {seed}", flush=True)
            save_file(self.train(contender, seed), beside := kept.with_suffix(".partial"))
            beside.rename(kept)
        return dict(sorted(load_file(kept).items()))

    def train(self, contender: str, seed: int) -> model.Adapter:
        config, folders = self.told(contender, seed), self.folders
        if not contender.startswith(FEDERATED):  # a reply is the next adapter, and has no half to leave to others
            config = replace(config, strategy="fedavg")
        if contender.startswith("site"):
            folders = [folders[int(contender.split()[1]) - 1]]
        if contender in PERSONAL:
            return self.trained_on(*self.sites(config, folders), self.adapter(FEDERATED, seed))
        if contender.startswith("pooled"):
            folders = [self.pool()]
            if contender.endswith("all steps"):
                config = replace(config, rounds=config.rounds * len(self.folders))
        return model.adapter_of(learned.federated(self.sites(config, folders), config))

    def trained_on(self, site: train.Site, adapter: model.Adapter) -> model.Adapter:
        model.apply_adapter(site.net, adapter)
        site.config = site.fits = personal.tail(site.config, 0)
        site.fit(site.privacy.seed(site.config.seed, site.folder.name, "personal"))
        return model.adapter_of(site.net)

    def pool(self) -> Path:
        """All sites' photos in one folder; those that a site holds out are held out of it too, as they are public."""
        return learned.pooled(self.folders, self.work / "pooled")

    def row(self, contender: str, seed: int, drawn: bool = True) -> Row:
        config, base = self.told(contender, seed), self.models / self.config.base_model
        sites = self.sites(config, self.folders)
        net, right = sites[0].net, dict.fromkeys(NEW, 0)
        if contender != BASE:  # whose adapter is the fresh one, of no effect
            model.apply_adapter(net, self.adapter(contender, seed))
        held_out = []
        for site in sites:
            model.apply_adapter(site.net, model.adapter_of(net))
            held_out.append(site.evaluate())
        known = self.work / f"known-{HELD_OUT}"
        if not known.exists():
            learned.write(known, draw.photos(draw.KNOWN, HELD_OUT * len(draw.KNOWN), learned.SEED))
        [forgotten] = learned.losses(net, {"": known}, config, base, self.work).values()
        drawings = DRAWINGS if drawn and self.count else 0
        pipe = learned.pipeline(net, base) if drawings else None
        for drawing in range(drawings):
            found = learned.right(pipe, model.adapter_of(net), config, self.count, NEW, 1000 * (drawing + 1))
            right = {name: right[name] + found[name] for name in NEW}
        return Row(contender, seed, forgotten, held_out, right, drawings * self.count)


def rows_of(comparison: Comparison, seeds: Sequence[int]) -> list[Row]:
    """A row for each contender and seed, seed by seed; the base draws the same for all. Goes on where it was."""
    kept = comparison.work / "rows.json"
    rows = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    for seed in seeds:
        for contender in comparison.contenders:
            if not any((row.contender, row.seed) == (contender, seed) for row in rows):
                rows.append(comparison.row(contender, seed, drawn=contender != BASE or seed == seeds[0]))
                files.write_json(kept, [asdict(row) for row in rows])
                print(table(rows), flush=True)
    wanted = [(contender, seed) for seed in seeds for contender in comparison.contenders]
    return [row for which in wanted for row in rows if (row.contender, row.seed) == which]


# --- tables -----------------------------------------------------------------------------------------------------------


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson 1927 (J. Am. Stat. Assoc. 22:209): it has a width at 0 and 1 too."""
    share, square = right / of, NORMAL**2
    middle, half = share + square / (2 * of), NORMAL * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return (middle - half) / (1 + square / of), (middle + half) / (1 + square / of)


def judged(rows: Sequence[Row], species: Sequence[str]) -> str:
    """Per cent over all pictures with Wilson's interval; then the lowest and the highest seed."""
    rows = [row for row in rows if row.pictures]
    if not rows:
        return "–"
    shares = [sum(row.right[name] for name in species) / (row.pictures * len(species)) for row in rows]
    right, of = (sum(parts) for parts in zip(*counts(rows, species), strict=True))
    low, high = wilson(right, of)
    said = f"{right / of:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
    return said + (f", {100 * min(shares):.0f} to {100 * max(shares):.0f}" if len(rows) > 1 else "")


def counts(rows: Sequence[Row], species: Sequence[str]) -> list[tuple[int, int]]:
    return [(row.right[name], row.pictures) for row in rows for name in species]


def change(values: Sequence[float], bases: Sequence[float]) -> str:
    """Per cent beside the base of the same seed: the mean over the seeds; then the lowest and the highest seed."""
    shares = [100 * (value / base - 1) for value, base in zip(values, bases, strict=True)]
    said = f"{sum(shares) / len(shares):+.0f} %"
    return said + (f", {min(shares):+.0f} to {max(shares):+.0f}" if len(shares) > 1 else "")


def losses(rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """Every row's on the known species, then on the photos of one site after another."""
    return list(zip(*((row.known, *row.held_out) for row in rows), strict=True))


def table(rows: Sequence[Row]) -> str:
    """Markdown, a row a contender: what it forgot, what it draws, and its loss at either site."""
    heads = ["", "known species", "site 1's two drawn", "site 2's two drawn", "site 1's photos", "site 2's photos"]
    bases = {row.seed: row for row in rows if row.contender == BASE}

    def cells(mine: Sequence[Row]) -> list[str]:
        drawn = [judged(mine, draw.UNSEEN[site]) for site in draw.UNSEEN]
        beside = losses([bases[row.seed] for row in mine])
        known, *sites = (
            f"{sum(values) / len(values):.4f}" if mine[0].contender == BASE else change(values, of_base)
            for values, of_base in zip(losses(mine), beside, strict=True)
        )
        return [known, *drawn, *sites]

    return _table(rows, heads, cells)


def by_species(rows: Sequence[Row]) -> str:
    """Markdown: a row a contender, the judge on each new species."""
    return _table(rows, ["", *NEW], lambda mine: [judged(mine, [name]) for name in NEW])


def _table(rows: Sequence[Row], heads: Sequence[str], cells: Callable[[Sequence[Row]], list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for contender in dict.fromkeys(row.contender for row in rows):
        mine = [row for row in rows if row.contender == contender]
        lines.append(f"| {contender} | " + " | ".join(cells(mine)) + " |")
    return "\n".join(lines) + "\n"


def sheet(comparison: Comparison, seed: int) -> Any:
    """Every contender's pictures of the same prompts, from the same noise."""
    loaded, rows = cache(lambda config: sample.pipeline(comparison.models / config.base_model, config)), []
    for contender in comparison.contenders:
        config = comparison.told(contender, seed)
        adapter = None if contender == BASE else comparison.adapter(contender, seed)
        rows.append(sample.render(loaded(config), adapter, PICTURED, config))
    return sample.grid(rows, list(comparison.contenders), PICTURED)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, nargs="+", action="extend", help="folders of finished runs")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds site-1 and site-2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="also those that no run is given of")
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS, metavar="NAME", help=f"{', '.join(CONTENDERS + PERSONAL)}"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the tables and the picture go")
    parser.add_argument("--work", type=Path, default=ROOT / ".bouquet/compare", help="what is kept of each step")
    parser.add_argument("--models", type=Path, default=HERE.parent, help="folder with the runs' base model")
    parser.add_argument("--count", type=int, default=16, help=f"pictures a species, {DRAWINGS} times")
    parser.add_argument("--docs", type=Path, help="the table into this page, such as README.md")
    asked = parser.parse_args(arguments)
    known = (*CONTENDERS, *PERSONAL)
    if strange := [n for n in asked.contenders if n not in known and not n.startswith(f"{FEDERATED}, ")]:
        parser.error(f"--contenders: {strange[0]!r} is none of {', '.join(known)} or '{FEDERATED}, KEY=VALUE ...'")
    configs = worth.alike(asked.run)
    seeds = list(dict.fromkeys([config.seed for config in configs] + asked.seeds))
    config = replace(configs[0], seed=0)
    used = [str(path.resolve()) for path in (*asked.run, asked.data, asked.models)]
    same = json.dumps([asdict(config), asked.count, used])
    work = asked.work / hashlib.sha256(same.encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    runs = {config.seed: run for config, run in zip(configs, asked.run, strict=True)}
    folders = [asked.data / f"site-{site}" for site in draw.UNSEEN]
    comparison = Comparison(folders, runs, config, work, asked.count, asked.models, tuple(asked.contenders))
    rows = rows_of(comparison, seeds)
    told = {
        "runs": {str(seed): run.resolve().name for seed, run in runs.items()},
        "rows": [asdict(row) for row in rows],
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    files.write_json(asked.out / "comparison.json", told)
    (asked.out / "comparison.md").write_text(f"{table(rows)}\n{by_species(rows)}")
    sheet(comparison, seeds[0]).save(asked.out / "comparison.png")
    if asked.docs:
        pages.write(asked.docs, MARK, table(rows))


if __name__ == "__main__":
    main()
