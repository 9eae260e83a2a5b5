"""How long a federated round takes, beside what its arithmetic costs and beside a plain implementation.

  scripts/bench [--quick | --tiny] [--repeats N] [--base sd|mini] [--photos FOLDER] [--json FILE] [--plot FILE]

naive: a quickstart's way, made correct (naive/); ours: this app; floor: the bare loop over encoded photos in a warm
process. All three in this run, on this machine, on the same photos; medians of the rounds after the first. Leaves a
Markdown table on stdout, all numbers as JSON, and the phases as stacked bars. A quarter of an hour; --quick, four
minutes; --tiny only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from benchmarks.speed import base, contenders
from benchmarks.speed.contenders import PHASES, Result, Task
from bouquet import ROOT

CONTENDERS = ("naive", "ours", "floor")
TINY = (1, 12, 4, 2)  # sites, images to train on and held out, steps: to see that it runs
GPU = ("gpu", "gpu-tries", "gpu-families", "accept")  # what benchmarks/gpu has
ELSEWHERE = dict.fromkeys(GPU, "gpu") | {
    "privacy": "learning",
    "methods": "learning",
}  # the folder of what is not in this one
MORE = {
    "sites": "a round with 2, 4 and 8 sites; the hub's time and memory with hundreds",
    "sizes": "what a site's round costs by images, rank and resolution",
    "memory": "what a site's process needs with a model of Stable Diffusion 1.5's size",
    "large": "an adapter of 45 M numbers through gateway and SuperLink, and what breaks in the middle of it",
    "tries": "what was tried to make the arithmetic cheaper",
    "gpu": "Stable Diffusion 1.5's UNet on a GPU",
    "gpu-tries": "what was tried to make the loop on a GPU cheaper",
    "gpu-families": "what SDXL's and Z-Image's nets cost on a GPU, with and without gradient checkpointing",
    "accept": "does a deployment work on this machine's GPU, and is it as fast as it should be: six minutes",
    "privacy": "what differential privacy costs with 200, 2,000 and 10,000 photos a site, and what it hides: hours",
    "methods": "ways of averaging LoRA side by side, and what keeps a model from forgetting: hours",
}


def steady(results: Sequence[Result]) -> dict[str, float]:
    """Median seconds by phase, and of the whole round (`round`), over every round but each run's first, where a run has
    more than one.
    """
    rounds = [entry for result in results for entry in result.rounds[1:] or result.rounds]
    return {p: statistics.median(r[p] for r in rounds) for p in PHASES} | {
        "round": statistics.median(sum(r.values()) for r in rounds)
    }


def row(name: str, values: Sequence[float], digits: int = 1) -> str:
    return f"| {name} | " + " | ".join(f"{value:.{digits}f}" if value else "-" for value in values) + " |"


def table(found: Mapping[str, Sequence[Result]]) -> str:
    """Markdown: seconds of a steady round by phase, then memory and bytes."""
    medians = [steady(results) for results in found.values()]
    lines = ["| seconds of a steady round | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    lines += [row(phase, [m[phase] for m in medians]) for phase in PHASES]
    lines += [row("**whole round**", [m["round"] for m in medians])]
    lines += [
        row("largest process of a site, peak MB", [max(r.peak_mb for r in results) for results in found.values()], 0)
    ]
    lines += [
        row("all processes of a site, peak MB", [max(r.site_mb for r in results) for results in found.values()], 0)
    ]
    lines += [
        row("all processes of the hub, peak MB", [max(r.hub_mb for r in results) for results in found.values()], 0)
    ]
    lines += [
        row("through the hub a round, MB", [results[0].facts.get("wire-mb", 0.0) for results in found.values()], 2)
    ]
    return "\n".join(lines)


def ratios(found: Mapping[str, Sequence[Result]]) -> dict[str, float]:
    """What the targets are about."""
    rounds = {name: steady(results)["round"] for name, results in found.items()}
    peaks = {name: max(result.peak_mb for result in results) for name, results in found.items()}
    return {
        "naive / ours, a round": rounds["naive"] / rounds["ours"],
        "ours / floor, a round": rounds["ours"] / rounds["floor"],
        "ours / naive, peak memory of a site": peaks["ours"] / peaks["naive"],
    }


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores of {names[0] if names else platform.machine()}, {time.strftime('%Y-%m-%d')}"


def prepare(home: Path, sites: int, images: int, kind: str, photos: Path | None = None) -> dict[str, Path]:
    """Certificates, the base model and photos (drawn, or of a folder) below `home`; site -> its folder."""
    base.build(home / "models", kind)
    names = [f"site-{number}" for number in range(1, sites + 1)]
    (home / "scripts").mkdir()
    for script in ("certs", "_lib.sh"):
        shutil.copy(ROOT / "scripts" / script, home / "scripts")  # it makes certificates in the folder above its own
    subprocess.run([home / "scripts/certs", *names], cwd=home, check=True, stdout=subprocess.DEVNULL)
    wanted = [
        f"--dataset={photos or 'mini'}",
        f"--sites={sites}",
        f"--images-per-site={images}",
        f"--out={home / 'data'}",
    ]
    subprocess.run(
        [sys.executable, "-m", "bouquet", "data", "partition", *wanted], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return {name: home / "data" / name for name in names}


def compare(args: argparse.Namespace) -> int:
    count, train, held_out, steps = TINY if args.tiny else (2, 40, 8, 5) if args.quick else (2, 400, 80, 50)
    kind = "tiny" if args.tiny else args.base
    found: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as folder:
        home = Path(folder)
        folders = prepare(home, count, train + held_out, kind, args.photos)
        task = Task(home, folders, train, held_out, steps, 8, args.rounds)
        for number in range(args.repeats):
            for name in CONTENDERS:
                show(f"{name}, {number + 1} of {args.repeats}")
                looked = name == "ours" and not number and not args.tiny
                idle = {"idle": 5.0 if args.quick else 30.0} if looked else {}
                alike = args.tiny and name == "naive"  # each of its rounds is as the first
                found[name].append(getattr(contenders, name)(replace(task, rounds=1) if alike else task, show, **idle))
    said = {
        "machine": machine(),
        "base": kind,
        "task": {k: v for k, v in vars(task).items() if k not in ("home", "sites")},
    }
    said |= {"steady": {n: steady(r) for n, r in found.items()}, "ratios": ratios(found)}
    said |= {
        "encode": {"first run": found["ours"][0].rounds[0]["encode"], "last run": found["ours"][-1].rounds[0]["encode"]}
    }
    said["contenders"] = {name: [vars(result) for result in results] for name, results in found.items()}
    keep(args.json, said)
    print(table(found) + "\n")
    for name, value in said["ratios"].items():
        print(f"{name}: {value:.2f}")
    print("ours: " + "  ".join(f"{name} {value:.2f}" for name, value in found["ours"][0].facts.items()))
    print("ours: encode, round 1 of " + ", ".join(f"{name} {value:.2f} s" for name, value in said["encode"].items()))
    print(
        f"{said['machine']}; {count} sites of {train} + {held_out} photos, {steps} steps of 8,"
        f" {args.repeats} x {args.rounds} rounds; {args.json}"
    )
    if args.plot:
        from benchmarks.speed import plot

        plot.bars({name: steady(results) for name, results in found.items()}, args.plot)
    return 0


def keep(file: Path, said: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(said, indent=1) + "\n")


def show(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    for name, about in MORE.items():
        command = commands.add_parser(name, help=about)
        command.add_argument("--json", type=Path, default=ROOT / f".bouquet/bench-{name}.json")
        command.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
        if name in GPU:
            command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        if name == "accept":
            command.add_argument("--only", default="", metavar="REGEX", help="only the checks whose names it finds")
        if name in ("gpu-tries", "gpu-families", "accept"):
            command.add_argument(
                "--limit",
                type=float,
                default=360,
                metavar="SECONDS",
                help="what does not end by then is left out (360)",
            )
        if name == "privacy":
            command.add_argument("--quick", action="store_true", help="a few photos and steps: minutes")
            command.add_argument("--photos", type=int, nargs="+", default=[200, 2000, 10_000], metavar="N")
            command.add_argument("--epsilon", nargs="+", default=["none", "8", "3", "1"], metavar="E")
            command.add_argument("--sites", type=int, default=2)
            command.add_argument("--steps", type=int, default=480, help="of each site, all rounds together (480)")
            command.add_argument("--held-out", type=int, default=200, help="photos of each site, about (200)")
            command.add_argument("--seed", type=int, default=42)
            command.add_argument("--docs", type=Path, metavar="FILE", help="the table into this page")
            command.add_argument("--picture", type=Path, metavar="FILE", help="what each cell draws")
        if name == "methods":
            from benchmarks.learning.methods import METHODS, SETTINGS

            command.add_argument("--quick", action="store_true", help="a few photos and steps: ten minutes")
            command.add_argument("--show", action="store_true", help="train nothing: what is there so far")
            command.add_argument("--contenders", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
            command.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
            command.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], metavar="N")
            for key, number in (("rounds", 8), ("steps", 15), ("batch", 8), ("photos", 120), ("pictures", 8)):
                command.add_argument(f"--{key}", type=int, default=number, metavar="N")
            command.add_argument("--real", type=Path, metavar="DIR", help="parquet of photographs with labels")
            command.add_argument("--docs", type=Path, metavar="FILE", help="the tables into this page")
        if name == "sites":
            command.add_argument(
                "--stub-only", action="store_true", help="leave out the deployments of 2, 4 and 8 sites"
            )
    parser.add_argument("--quick", action="store_true", help="a tenth of the images and steps")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--base", choices=("sd", "mini"), default="sd", help="a random model in Stable Diffusion's shape, or mini"
    )
    parser.add_argument(
        "--photos", type=Path, metavar="FOLDER", help="divide these photos among the sites (drawn flowers)"
    )
    parser.add_argument("--json", type=Path, default=ROOT / ".bouquet/bench.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the phases as stacked bars")
    args = parser.parse_args(arguments)
    if args.command:
        folder = ELSEWHERE.get(args.command, "speed")
        return import_module(f"benchmarks.{folder}.{args.command.replace('-', '_')}").main(args)
    return compare(args)


if __name__ == "__main__":
    from bouquet.ended import quietly

    sys.exit(quietly(main))
