"""What differential privacy at the sites costs, and what it hides: drawn flowers, N photos a site, epsilon or none.

  scripts/bench privacy [--quick] [--photos 200 2000 10000] [--epsilon none 8 3 1] [--sites N] [--steps N]
      [--docs FILE] [--picture FILE]

Each cell trains the demo's base model with N photos a site (in one process; after a round the mean of the sites), under
so much noise that the whole training costs each photo epsilon, and then tells how much of the gain in validation loss
is kept and how well membership.py tells photos that were trained on from held-out ones. Cells are written down one by
one, so that who is interrupted goes on with the next. --docs writes the table into a page, between its marks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.speed.__main__ import keep, machine, show
from bouquet import ROOT

MARK = "privacy-cost"  # in the page
DELTA = 1e-5
ROUNDS = 3
Cell = dict[str, Any]


def noise_for(epsilon: float, rate: float, steps: int, delta: float = DELTA) -> float:
    """The least noise multiplier, to a hundredth, at which so many steps cost epsilon at most."""
    from app.site import accountant

    low, high = 0.0, 1.0
    costs = lambda noise: accountant.epsilon([accountant.Steps(rate, noise, steps)], delta)  # noqa: E731
    while costs(high) > epsilon:
        low, high = high, 2 * high
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if costs(middle) > epsilon else (low, middle)
    return round(high + 0.005, 2)


def cell(home: Path, args: argparse.Namespace, count: int, epsilon: str) -> Cell:
    """One training, and what it gave away."""
    from app import model
    from app.adapter import store
    from app.config import RunConfig
    from app.site import train
    from app.site.accountant import Terms
    from app.site.budget import Promise
    from bouquet.adapter import membership
    from models.mini import draw, learned

    began, steps = time.monotonic(), args.steps // ROUNDS
    fraction = max(0.01, args.held_out / (count + args.held_out))  # no run holds out less
    known = {
        "batch-size": 16,
        "local-steps": steps,
        "rounds": ROUNDS,
        "precision": "fp32",
        "validation-fraction": fraction,
    }
    config = RunConfig.read(known | {"seed": args.seed})
    sites = [
        train.Site(
            config, ROOT / "models",
            learned.write(home / f"photos-{count}-{n}", draw.site_photos(n, count + args.held_out, args.seed)),
            home / f"cache-{count}-{n}", "",
        )
        for n in range(1, args.sites + 1)
    ]  # fmt: skip
    adapter = model.adapter_of(sites[0].net)
    before = [site.evaluate() for site in sites]
    trained = [len(site.photos) for site in sites]
    noise = clip = None
    if epsilon != "none":
        clip = Promise(1.0).clip
        noise = noise_for(float(epsilon), max(min(1.0, config.batch_size / n) for n in trained), ROUNDS * steps)
    for number in range(1, ROUNDS + 1):
        replies = []
        for site in sites:
            model.apply_adapter(site.net, adapter)
            if noise is None:
                site.fit(site.privacy.seed(args.seed, site.folder.name, number), number)
            else:
                site.fit_privately(Terms(len(site.photos), config.batch_size, noise, clip), number)
            replies.append(model.adapter_of(site.net))
        adapter = {key: sum(reply[key] for reply in replies) / len(replies) for key in adapter}
    store.save_file(adapter, drawn_by(home, count, epsilon, args.seed), {})
    after, attacks = [], []
    for site in sites:
        model.apply_adapter(site.net, adapter)
        after.append(site.evaluate())
        ours, others = (
            membership.scores(
                site.net, site.objective, of, range(min(args.held_out, len(of.keys))), adapter, site.privacy.digest, 64
            )
            for of in (site.train, site.held_out)
        )
        attacks.append({kind: vars(membership.attack(ours[kind], others[kind])) for kind in membership.ATTACKS})
    return {
        "photos": count, "epsilon": epsilon, "sites": args.sites, "steps": ROUNDS * steps, "held-out": args.held_out,
        "seed": args.seed, "trained": trained, "noise": noise, "clip": clip, "before": before, "after": after,
        "attacks": attacks, "seconds": round(time.monotonic() - began), "machine": machine(),
    }  # fmt: skip


def drawn_by(home: Path, count: int, epsilon: str, seed: int) -> Path:
    """The file of a cell's adapter."""
    return home / f"adapter-{count}-{epsilon}-{seed}.safetensors"


def picture(home: Path, cells: list[Cell], file: Path, tiny: bool) -> None:
    """A row a cell that has an adapter here, the base model above; four flowers that it was to learn."""
    from safetensors.torch import load_file

    from app.adapter import sample
    from app.config import RunConfig
    from models.mini import draw

    prompts = [draw.caption(species, colour, "meadow") for species in draw.UNSEEN[1] for colour in ("red", "white")]
    contenders: dict[str, Any] = {"base": None}
    for one in cells:
        if (adapter := drawn_by(home, one["photos"], one["epsilon"], one["seed"])).exists():
            said = "no noise" if one["epsilon"] == "none" else f"epsilon {one['epsilon']}"
            contenders[f"{one['photos']:,} photos, {said}"] = load_file(adapter)
    config = RunConfig.read({"sample-steps": 2} if tiny else {})
    pipe = sample.pipeline(ROOT / "models/mini", config)
    rows = [sample.render(pipe, adapter, prompts, config) for adapter in contenders.values()]
    sample.grid(rows, list(contenders), prompts, cell=96).save(file)


def kept(found: Cell, without: Cell | None) -> float | None:
    """The share of the gain in loss that a training without noise has; None where there was none to compare with."""
    gains = [statistics.fmean(one["before"]) - statistics.fmean(one["after"]) for one in (found, without or found)]
    return None if without is None else gains[0] / gains[1]


def table(cells: list[Cell]) -> str:
    """Markdown, a row a cell."""
    plain = {one["photos"]: one for one in cells if one["epsilon"] == "none"}
    lines = [
        "| photos a site | epsilon | noise | loss before → after | gain kept | membership by the loss | by PIA |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in cells:
        share = kept(one, plain.get(one["photos"]))
        areas = [
            ", ".join(f"{a[kind]['auc']:.2f} [{a[kind]['low']:.2f}, {a[kind]['high']:.2f}]" for a in one["attacks"])
            for kind in ("loss", "pia")
        ]
        loss = " → ".join(f"{statistics.fmean(one[when]):.4f}" for when in ("before", "after"))
        noise = "–" if one["noise"] is None else f"{one['noise']:g}"
        said = "–" if share is None else f"{100 * share:.0f} %"
        lines.append(f"| {one['photos']:,} | {one['epsilon']} | {noise} | {loss} | {said} | {areas[0]} | {areas[1]} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    if args.quick or args.tiny:
        few = {"photos": [60], "steps": 6, "held_out": 60} if args.quick else {"photos": [8], "steps": 3, "held_out": 4}
        args = argparse.Namespace(**vars(args) | few | {"epsilon": ["none", "8"]})
    home = args.json.with_suffix("")
    home.mkdir(parents=True, exist_ok=True)
    cells: list[Cell] = json.loads(args.json.read_text()) if args.json.exists() else []
    alike = ("photos", "epsilon", "sites", "steps", "held-out", "seed")
    for count in args.photos:
        for epsilon in args.epsilon:
            asked = (count, epsilon, args.sites, args.steps // ROUNDS * ROUNDS, args.held_out, args.seed)
            if any(tuple(one[key] for key in alike) == asked for one in cells):
                continue
            show(f"{count} photos a site, epsilon {epsilon}")
            cells.append(cell(home, args, count, epsilon))
            keep(args.json, cells)
    shown = sorted(
        cells, key=lambda one: (one["photos"], -math.inf if one["epsilon"] == "none" else -float(one["epsilon"]))
    )
    print(table(shown))
    print(f"{args.sites} sites, {args.steps} steps of 16, delta {DELTA:g}; {machine()}; {args.json}")
    if args.docs:
        pages.write(args.docs, MARK, table(shown))
    if args.picture:
        picture(home, shown, args.picture, args.tiny)
    return 0
