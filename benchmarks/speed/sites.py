"""How a round's cost grows with the number of sites: real ones on this machine, and hundreds of stubs at the hub.
`scripts/bench sites`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed import contenders
from benchmarks.speed.__main__ import keep, machine, prepare, show
from benchmarks.speed.contenders import Task
from bouquet import ROOT

REAL, STUBS = (2, 4, 8), ((50, 6.4), (200, 6.4), (400, 6.4), (400, 0.33))


def real(count: int) -> dict[str, float]:
    """The real deployment with a small model, where the round's fixed costs show: median seconds of the rounds after
    the first.
    """
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
        task = Task(Path(home), prepare(Path(home), count, 20, "tiny"), 16, 4, 5, 8, 4)
        done = contenders.ours(task, show)
    after = done.rounds[1:]
    seconds = statistics.median(sum(entry.values()) for entry in after)
    work = statistics.median(sum(entry.values()) - entry["wait"] - entry["transfer"] for entry in after)
    return {
        "sites": count,
        "seconds": seconds,
        "work": work,
        "up": done.facts["up"],
        "site-mb": done.site_mb,
        "hub-mb": done.hub_mb,
    }


def stub(count: int, megabytes: float) -> dict[str, float]:
    show(f"{count} stub sites, adapters of {megabytes} MB")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.hub", str(count), str(megabytes)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(reals: list[dict[str, float]], stubs: list[dict[str, float]]) -> str:
    lines = (
        [
            "| sites | seconds a round | of it, a site's work | up, s | a site's memory, MB | the hub's, MB |",
            "| --- |" + " --- |" * 5,
        ]
        if reals
        else []
    )
    lines += [
        f"| {r['sites']} | {r['seconds']:.1f} | {r['work']:.1f} | {r['up']:.0f} | {r['site-mb']:.0f} |"
        f" {r['hub-mb']:.0f} |"
        for r in reals
    ]
    lines += [
        "",
        "| sites (stubs) | adapter, MB | hub's seconds a round | ms a site | more memory, MB | all replies, MB |",
        "| --- |" + " --- |" * 5,
    ]
    for r in stubs:
        each = 1000 * r["seconds"] / r["sites"]
        lines.append(
            f"| {r['sites']} | {r['adapter-mb']:.2g} | {r['seconds']:.1f} | {each:.0f} | {r['more-mb']:.0f} |"
            f" {r['replies-mb']:.0f} |"
        )
    return "\n".join(lines).strip()


def main(args: argparse.Namespace) -> int:
    stubs = [stub(*size) for size in (((20, 0.1),) if args.tiny else STUBS)]
    reals = [] if args.stub_only else [real(count) for count in (REAL[:1] if args.tiny else REAL)]
    print(table(reals, stubs))
    print(f"\n{machine()}; {args.json}")
    keep(args.json, {"machine": machine(), "real": reals, "stubs": stubs})
    return 0
