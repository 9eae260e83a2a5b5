"""Ways to fine-tune LoRA together, on a text-to-image model: what each learns, forgets and sends, in one table.

  scripts/bench methods [--quick] [--contenders NAME...] [--settings NAME...] [--seeds N...] [--real DIR] [--docs FILE]

Each cell trains the demo's base model in one process, by one method, with one seed: every site takes the same steps
from the same photos whatever the method, by the app's own training and, where it has the method, its own averaging;
averaging.py has the rest. Then it tells the loss at fixed noise on photos that nobody trained on, by kind, and lets the
demo's judge look at drawn pictures. `photos.py` has the settings. A cell is written down as soon as it is there, and
who is interrupted goes on with the next: first every method of the first setting with the first seed.
--docs writes the tables into a page, between its marks; --show trains nothing and tells what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import pages
from benchmarks.speed.__main__ import machine, show
from bouquet import ROOT
from models.mini import draw

if TYPE_CHECKING:
    from benchmarks.learning.photos import Setting

MARK = "methods"  # in the page
MODELS = ROOT / "models"
HELD_OUT = 12  # photos a kind that nobody trains on, at most
DECAY = 0.05  # of the adapter, a round
BESIDE = "fedavg"  # the row that the others are held against


@dataclass(frozen=True)
class Method:
    """who: whose photos one training has, "all" (a federation), "each" site's alone, "pooled", or nobody's ("").

    run: keys of the run's config. trains: the adapter's halves, round by round in turn. averages: the app's strategy,
    or averaging.py's. common: see photos.disjoint. order: of the photos, order.py's. longer: all sites' steps in place
    of one's.
    """

    about: str
    who: str = "all"
    run: Mapping[str, Any] = field(default_factory=dict)
    trains: tuple[str, ...] = ("AB",)
    averages: str = "strategy"
    common: str = "photos"
    order: str = ""
    longer: bool = False

    @property
    def of_photos(self) -> bool:
        """Whether it is fedavg but for what photos the sites have, or in which order they come."""
        return self.common != "photos" or self.order != ""

    def halves(self, number: int) -> str:
        """What round `number`, from 1, trains."""
        return self.trains[(number - 1) % len(self.trains)]


METHODS = {
    "base": Method("before any training", who=""),
    "alone": Method("each site by itself, from its photos, with as many steps", who="each"),
    "pooled, same steps": Method("all photos in one place, with one site's steps", who="pooled"),
    "pooled, all steps": Method("all photos in one place, with all sites' steps", who="pooled", longer=True),
    "fedavg, constant rate": Method(
        "fedavg whose rate does not fall over the last quarter", run={"learning-rate-schedule": "constant"}
    ),
    BESIDE: Method("the app's default: A and B averaged apart (McMahan et al. 2017, arXiv:1602.05629)"),
    "exact": Method(
        "FedEx-LoRA: what the products' mean is beyond that goes into the base (Singhal et al. 2024, arXiv:2410.09432)",
        averages="exact",
    ),
    "svd": Method("the app's: the products' mean, cut to the rank", run={"strategy": "svd"}),
    "alternate": Method(
        "the app's RoLoRA: B and A in turn (Chen et al. 2024, arXiv:2409.02346)",
        run={"strategy": "alternate"},
        trains=("B", "A"),
    ),
    "ffa": Method("FFA-LoRA: B alone (Sun et al. 2024, arXiv:2403.12313)", trains=("B",)),
    "flora": Method(
        "FLoRA: sites' modules stacked into the base, a fresh adapter each round (Wang et al. 2024, arXiv:2409.05976)",
        averages="stacked",
    ),
    "fedadam": Method(
        "the mean of the updates as a gradient, rate 0.01 (Reddi et al. 2021, arXiv:2003.00295)",
        run={"strategy": "fedadam", "server-learning-rate": 0.01},
    ),
    "fedprox 0.01": Method(
        "a pull to the global adapter (Li et al. 2020, arXiv:1812.06127)", run={"proximal-mu": 0.01}
    ),
    "rank 4": Method("fedavg with an adapter of a quarter of the size", run={"lora-rank": 4}),
    "attention alone": Method("fedavg with no adapter in the residual blocks", run={"lora-targets": "attention"}),
    "rank by layer": Method(
        "fedavg with a quarter of the rank but where the words are read",
        run={"lora-rank": 4, "rank-pattern": "attn2=16"},
    ),
    "decay": Method(
        "fedavg that takes 5 % of the adapter away after each round before the rate falls (Krogh and Hertz 1991)",
        averages="shrunk",
    ),
    "no caption dropout": Method("fedavg that trains on every caption", run={"caption-dropout": 0.0}),
    "even batches": Method("fedavg whose batches all have their share of each species", order="even"),
    "known last": Method(
        "fedavg that comes to the known species' photos last, in each pass over all", order="known last"
    ),
    "own photos alone": Method("fedavg whose sites have no photo of a species that the base knows", common=""),
    "own, class images": Method(
        "such photos are class images instead, twice the work (Ruiz et al. 2023, arXiv:2208.12242)",
        run={"prior-loss-weight": 1.0, "prior-target": "noise"},
        common="class-images",
    ),
    "own, base kept": Method(
        "such class images, to predict what the base model does (Li and Hoiem 2016, arXiv:1606.09282)",
        run={"prior-loss-weight": 1.0},
        common="class-images",
    ),
}  # fmt: skip
SETTINGS = {
    "disjoint": "two sites, each with photos of two species that the base has never seen",
    "dirichlet": "four sites, four new species divided by Dirichlet(0.1)",
    "real": "two sites, five classes of photographs each",
}


@dataclass(frozen=True)
class Sizes:
    rounds: int
    steps: int
    batch: int
    photos: int
    held_out: int
    pictures: int


@dataclass(frozen=True)
class Cell:
    """shares: as Setting's. loss, right: by kind, one of each for every model that the method ends with. up: bytes."""

    setting: str
    contender: str
    seed: int
    sizes: Sizes
    shares: list[dict[str, float]]
    loss: list[dict[str, float]]
    right: list[dict[str, int]]
    up: float
    seconds: float
    machine: str

    def over(self, pairs: Callable[[int, int], bool]) -> float:
        """Mean loss of site i's model on photos of site j's new kinds, over the pairs that are asked for."""
        sites = range(len(self.shares))
        return statistics.fmean(
            sum(share * self.loss[i if len(self.loss) > 1 else 0][kind] for kind, share in self.shares[j].items())
            for i in sites
            for j in sites
            if pairs(i, j)
        )

    @property
    def own(self) -> float:
        return self.over(lambda i, j: i == j)

    @property
    def others(self) -> float:
        return self.over(lambda i, j: i != j)

    @property
    def everybody(self) -> float:
        return self.over(lambda i, j: True)

    @property
    def known(self) -> float:
        return statistics.fmean(loss[kind] for loss in self.loss for kind in draw.KNOWN)

    @property
    def judged(self) -> float | None:
        """Share of the pictures of new kinds in which the judge sees what was asked for."""
        kinds = [count for model in self.right for count in model.values()]
        return sum(kinds) / (self.sizes.pictures * len(kinds)) if kinds else None


# --- a training -------------------------------------------------------------------------------------------------------


def sites_of(method: Method, setting: Setting, config: Any, home: Path) -> list[list[Any]]:
    """The sites of each federation that the method is: one of all, each by itself, or one with everybody's photos."""
    from app.site import train
    from models.mini import learned

    folders = setting.folders
    if method.who == "pooled":
        folders = [learned.pooled(folders, folders[0].parent / "pooled")]
    sites = [
        train.Site(config, MODELS, folder, home / "cache" / f"{folder.parent.name}-{folder.name}", "")
        for folder in folders
    ]
    return [[site] for site in sites] if method.who == "each" else [sites]


def federated(sites: Sequence[Any], config: Any, method: Method) -> tuple[Any, float]:
    """All rounds of these sites, in this process. Returns (the net, whose base may have changed, with the last adapter
    on it; bytes that a site sends a round).
    """
    from app import lora, model
    from app.hub.strategy import Strategy
    from app.site import rate
    from benchmarks.learning import averaging, order
    from models.mini import learned

    net, hub = sites[0].net, Strategy(config)
    start = model.adapter_of(net)
    scales = lora.scales(start, config)

    def average(number: int, replies: Sequence[Any], adapter: Any) -> Any:
        if method.averages == "exact":
            adapter, dense = averaging.exact(replies, scales)
            averaging.into_base(net, dense)
            return adapter
        if method.averages == "stacked":
            averaging.into_base(net, averaging.stacked(replies, scales))
            return averaging.fresh(adapter, 1000 * config.seed + number)
        adapter = hub.aggregate(number, replies, adapter)
        if method.averages == "shrunk" and number <= config.rounds - config.rounds / rate.LAST:
            return averaging.shrunk(adapter, DECAY)
        return adapter

    kinds = {photo.key: draw.named(photo.caption) for site in sites for photo in site.photos} if method.order else {}
    with order.ordered(method.order, kinds, draw.KNOWN):
        learned.federated(sites, config, average, lambda _, number: averaging.train_only(net, method.halves(number)))
    sent = [averaging.sent(start, method.halves(number)) for number in range(1, config.rounds + 1)]
    return net, statistics.fmean(sent or [0])


def cell(home: Path, name: str, contender: str, seed: int, sizes: Sizes, source: Path | None) -> Cell:
    from app import model
    from app.config import RunConfig
    from benchmarks.learning import photos
    from models.mini import learned

    logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells of every mean; set after it is imported
    method = METHODS[contender]
    known = {"rounds": sizes.rounds, "local-steps": sizes.steps, "batch-size": sizes.batch, "precision": "fp32"}
    config = RunConfig.read(known | {"validation-fraction": 0.01, "seed": seed} | method.run)
    make = {
        "disjoint": partial(photos.disjoint, common=method.common),
        "dirichlet": photos.dirichlet,
        "real": partial(photos.real, source=source),
    }
    setting = make[name](home, seed, sizes.photos, sizes.held_out)
    if method.longer:
        config = replace(config, rounds=config.rounds * len(setting.folders))
    if not method.who:
        config = replace(config, rounds=0)
    base, loss, right, up, seconds = MODELS / config.base_model, [], [], 0.0, 0.0
    for sites in sites_of(method, setting, config, home):
        began = time.process_time()
        net, up = federated(sites, config, method)
        seconds += time.process_time() - began
        loss.append(learned.losses(net, setting.held_out, config, base, home / "cache"))
        if sizes.pictures and name != "real":
            pipe, adapter = learned.pipeline(net, base), model.adapter_of(net)
            right.append(learned.right(pipe, adapter, config, sizes.pictures, photos.NEW))
    up = up if method.who == "all" else 0.0
    return Cell(name, contender, seed, sizes, setting.shares, loss, right, up, round(seconds, 1), machine())


# --- what was found ---------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], signed: bool = True) -> str:
    """Per cent: the mean, and the standard deviation over the seeds."""
    middle = f"{100 * statistics.fmean(values):{'+' if signed else ''}.1f}"
    return f"{middle} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else middle


def table(cells: Sequence[Cell]) -> str:
    """Markdown of one setting's cells, a row a contender: losses beside the base's, and beside fedavg's of the seed."""
    [base, *_] = [one for one in cells if one.contender == "base"] or [None]
    beside = {one.seed: one for one in cells if one.contender == BESIDE}
    lines = [
        "| | own new | others' new | known | new, beside fedavg | judge | kB a round | CPU s | seeds |",
        "| --- " * 9 + "|",
    ]
    for name in METHODS:
        rows = [one for one in cells if one.contender == name]
        if not rows:
            continue
        parts = [
            spread([getattr(one, part) / getattr(base, part) - 1 for one in rows]) if base else "–"
            for part in ("own", "others", "known")
        ]
        paired = [one.everybody / beside[one.seed].everybody - 1 for one in rows if one.seed in beside]
        judged = [one.judged for one in rows if one.judged is not None]
        parts += [
            spread(paired) if paired and name not in ("base", BESIDE) else "–",
            spread(judged, signed=False) if judged else "–",
            f"{rows[0].up / 1000:,.0f}" if rows[0].up else "–",
            f"{statistics.fmean(one.seconds for one in rows):.0f}" if rows[0].contender != "base" else "–",
            str(len(rows)),
        ]
        lines.append(f"| {name} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def told(cells: Sequence[Cell]) -> str:
    """A table a setting, and what each row is."""
    parts = []
    for name, about in SETTINGS.items():
        if some := [one for one in cells if one.setting == name]:
            sizes = some[0].sizes
            parts.append(
                f"**{about[0].upper()}{about[1:]}**: {sizes.rounds} rounds of {sizes.steps} steps of {sizes.batch},"
                f" about {sizes.photos} photos a site; {some[0].machine}.\n\n{table(some)}"
            )
    used = {one.contender for one in cells}
    parts.append("\n".join(f"- **{name}**: {method.about}." for name, method in METHODS.items() if name in used))
    return "\n\n".join(parts)


def read(file: Path) -> list[Cell]:
    rows = json.loads(file.read_text()) if file.exists() else []
    return [Cell(**row | {"sizes": Sizes(**row["sizes"])}) for row in rows]


def keep(file: Path, cells: Sequence[Cell]) -> None:
    from app import files

    files.write_json(file, [asdict(one) for one in cells])


def asked(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(setting, contender, seed) in the order in which they are wanted; who differs in the photos alone, or their
    order, has a row in the first setting, whose photos these are.
    """
    settings = [name for name in args.settings if name != "real" or args.real]
    cells = []
    for setting in settings:
        for seed in args.seeds:
            for name in args.contenders:
                once = name == "base" and seed != args.seeds[0]
                if not once and (setting == "disjoint" or not METHODS[name].of_photos):
                    cells.append((setting, name, seed))
    return cells


def main(args: argparse.Namespace) -> int:
    if args.tiny:
        sizes = Sizes(1, 1, 2, 8, 2, 0)
        args = argparse.Namespace(**vars(args) | {"seeds": args.seeds[:1], "settings": ["disjoint"]})
    elif args.quick:
        sizes = Sizes(2, 3, 4, 24, 2, 1)
        args = argparse.Namespace(**vars(args) | {"seeds": args.seeds[:1]})
    else:
        sizes = Sizes(args.rounds, args.steps, args.batch, args.photos, HELD_OUT, args.pictures)
    if args.real and not args.real.is_dir():
        show(f"no real photos: {args.real} is not there")
        args.real = None
    home, cells = args.json.with_suffix(""), read(args.json)
    home.mkdir(parents=True, exist_ok=True)
    for setting, name, seed in () if args.show else asked(args):
        if sizes.rounds < len(METHODS[name].trains):
            show(f"{setting}, {name}: left out, as it takes {len(METHODS[name].trains)} rounds to train every part")
        elif not any((c.setting, c.contender, c.seed, c.sizes) == (setting, name, seed, sizes) for c in cells):
            show(f"{setting}, {name}, seed {seed}")
            cells.append(cell(home, setting, name, seed, sizes, args.real))
            keep(args.json, cells)
    text = told([one for one in cells if one.sizes == sizes])
    print(text)
    if args.docs:
        pages.write(args.docs, MARK, text)
    return 0
