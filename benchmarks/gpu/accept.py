"""Does a deployment work on this machine's GPU, and is it as fast as it should be? `scripts/bench accept`, six
minutes, no network.

  scripts/bench accept [--device cuda|cpu] [--tiny] [--only REGEX] [--limit SECONDS] [--json FILE]

One line a check as it ends, then a Markdown table. The JSON file is written anew after every check: whatever ends the
command, it has what was found until then. `result` says whether it works, `target` whether it is as fast and as frugal
as it should be. Exit code: 0 when all is as it should be; 1 when something is not, or was not looked at for want of
time; 2 without a GPU; 128 + a signal's number.

  device     torch, driver, NVML's facts, memory, a bf16 matrix product, who else computes on the GPU
  fork       children of the SuperExec's fork server can use the GPU, whatever PYTORCH_NVML_BASED_CUDA_CHECK is
             target: a child starts within 2 s, for the server has the libraries
  preflight  a site's own checks, with a real step of a model of Stable Diffusion 1.5's sizes
             target: the estimate is the step's peak, 20 % more or less
  mini       two sites on the one GPU, three rounds: the loss falls, the history has the GPU's name, memory,
             utilisation and joules
  sd15       one site, that model at 512 pixels, beside its floor: evaluation and steps in a warm process
             target: a steady round takes at most 1.25 floors
  resume     two rounds, then two more: one history, each round from the adapter of the one before
  memory     the GPU too full for a batch: the site halves it; too full for half of it: SITE-13, and the run ends HUB-02
  again      two runs one after another: each has its own worker, which leaves nothing on the GPU
  killed     SIGKILL for a site's worker in the middle of a round: the round is tried again, and the run completes
  loop       scripts/bench gpu at fewer steps
             targets: twice diffusers' images/s at 8 images; at the best batch 40 % of the matrix product's rate

What SDXL's and Z-Image's nets cost at 1024 pixels, with and without checkpointing and with the base in 8 and 4 bits, is
a command of its own, which the end of this one names: scripts/bench gpu-families.

A longer --limit is for a machine that is busy: each check then may take longer in the same proportion.
--device cpu --tiny is a dry run, which shows that the command works and says nothing of a GPU: `memory` is skipped,
targets are told and not judged. The base model has random weights, the photos are drawn; hub and sites are processes
on loopback with certificates of their own. All of it lies in one temporary folder (5 GB; 50 MB with --tiny), which is
gone afterwards.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu import accept_machine, accept_memory, accept_runs
from benchmarks.gpu.accept_desk import Desk, Late, Skip, Wrong
from benchmarks.gpu.accept_found import NO_TIME, Found, Report, Row
from benchmarks.gpu.accept_world import BOTH, FULL, ONE, TINY, World

LIMIT = 360.0  # seconds for all of it, on a machine that has nothing else to do
ENDING = 8.0  # seconds of the limit that are kept for ending what runs
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MORE = "the large families' nets, images/s and memory at 1024 pixels: scripts/bench gpu-families"
GRACE = 5.0  # seconds that a check has after its time, to end by itself


@dataclass(frozen=True)
class Check:
    """`least`: seconds that must be left for it to begin; `most`: that it may take; `needs`: what must have been made
    (World.begin).

    `waits`: most of its time it waits for Flower, and the next check runs meanwhile.
    """

    work: Callable[[Desk], Found]
    least: float
    most: float
    needs: tuple[str, ...] = ()
    waits: bool = False


HUB, LARGE = ("photos", "hub"), ("photos", "hub", "base")
CHECKS = {
    "device": Check(accept_machine.device, 5, 60),
    "fork": Check(accept_machine.fork, 10, 120),
    "preflight": Check(accept_machine.preflight, 15, 150, LARGE),
    "mini": Check(accept_runs.mini, 15, 150, HUB),
    "sd15": Check(accept_runs.sd15, 40, 200, LARGE),
    "resume": Check(accept_runs.resume, 15, 120, HUB),
    "memory": Check(accept_memory.memory, 25, 120, HUB),
    "again": Check(accept_runs.again, 15, 120, HUB),
    "killed": Check(accept_runs.killed, 75, 160, HUB, waits=True),
    "loop": Check(accept_machine.loop, 15, 120),
}


class Running(threading.Thread):
    """One check under way; `row` is its result once it has ended."""

    def __init__(self, world: World, name: str, check: Check, end: float) -> None:
        super().__init__(daemon=True, name=name)
        self.world, self.check, self.end_of_all, self.row = world, check, end, None
        self.began = time.monotonic()
        self.time = min(check.most * world.patience, end - self.began)
        self.desk = Desk(world, self.time)
        self.start()

    def run(self) -> None:
        try:
            with self.desk as desk:
                try:
                    row = Row.of(self.name, self.check.work(desk), self.took(), judged=self.world.cuda)
                except Skip as why:
                    row = self.result("skip", str(why))
                except (Wrong, Late) as error:
                    row = self.result("fail", str(error), self.world.logs(desk))
                except Exception as error:  # not foreseen: say so, and let the other checks go on
                    row = self.result(
                        "fail", f"{type(error).__name__}: {' '.join(str(error).split())}", self.world.logs(desk)
                    )
        except Exception as error:  # while ending its processes
            row = self.result("fail", f"{type(error).__name__}: {error}")
        self.row = self.row or row

    def took(self) -> float:
        return time.monotonic() - self.began

    def result(self, state: str, text: str, logs: dict[str, str] | None = None) -> Row:
        """A check that the end of all time cut off was not looked at."""
        if state == "fail" and time.monotonic() >= self.end_of_all:
            state, text = "skip", f"{NO_TIME}: {text}"
        return Row(self.name, state, text, self.took(), facts={"logs": logs} if logs else {})

    def finish(self) -> Row:
        """Its result, when it has ended; one that does not end in its time has failed."""
        self.join(max(0.0, self.began + self.time + GRACE - time.monotonic()))
        if not self.row:
            self.row = self.result("fail", f"it did not end within {self.time:.0f} s")
            self.desk.__exit__()
        return self.row


def work_through(world: World, report: Report, end: float, checks: dict[str, Check]) -> None:
    """Every wanted check, one after another, but for those that mostly wait."""
    waiting: list[Running] = []
    for name in report.wanted:
        if end - time.monotonic() < checks[name].least:
            tell(report, Row(name, "skip", NO_TIME, 0.0))
            continue
        running = Running(world, name, checks[name], end)
        if checks[name].waits:
            waiting.append(running)
            continue
        tell(report, running.finish())
        for other in [other for other in waiting if other.row]:
            waiting.remove(other)
            tell(report, other.finish())
    for other in waiting:
        tell(report, other.finish())


def tell(report: Report, row: Row) -> None:
    report.add(row)
    print(row, flush=True)


def hold_signals() -> None:
    """From here on nothing disturbs the ending of what was started."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_end_it() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP end the command through its `with` statements; a second one does not disturb that."""

    def end(number: int, _: FrameType | None) -> None:
        hold_signals()
        sys.exit(128 + number)

    # not under nohup
    ours = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def chosen(only: str) -> list[str]:
    """The checks that a regular expression finds, in their order; none where it is not one."""
    try:
        return [name for name in CHECKS if re.search(only, name)]
    except re.error:
        return []


def main(args: argparse.Namespace) -> int:
    began = time.monotonic()  # the limit holds from here: torch alone may take seconds to say that there is a GPU
    if not (wanted := chosen(args.only)):
        print(f"bench accept: --only {args.only} finds none of {', '.join(CHECKS)}", file=sys.stderr)
        return 1
    if args.device == "cuda" and (why := no_gpu()):
        print(f"bench accept: no GPU: {why}, so nothing was looked at.", file=sys.stderr)
        print(
            "  fix    run it where nvidia-smi shows a GPU; scripts/bench accept --device cpu --tiny shows that it runs",
            file=sys.stderr,
        )
        return 2
    return accept(args, wanted, CHECKS, began)


def no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device here"


def accept(args: argparse.Namespace, wanted: list[str], checks: dict[str, Check], began: float) -> int:
    """The wanted checks, told and written; the exit code. began: when the limit's seconds began (time.monotonic)."""
    from benchmarks.speed.__main__ import machine

    sizes = TINY if args.tiny else FULL
    about: dict[str, Any] = {"machine": machine(), "device": args.device, "limit": args.limit, "sizes": asdict(sizes)}
    report, state = Report(args.json, wanted, about), "cut off"
    with signals_end_it():
        try:
            report.write("running")
            folder = tempfile.TemporaryDirectory(prefix="bouquet-accept-", ignore_cleanup_errors=True)
            patience = max(1.0, args.limit / LIMIT)
            with folder as home, World(Path(home), args.device, sizes, patience) as world:
                world.begin({need for name in wanted for need in checks[name].needs}, BOTH if "mini" in wanted else ONE)
                work_through(world, report, began + args.limit - ENDING, checks)
                hold_signals()
            state = report.verdict
        finally:
            report.about["seconds"] = round(time.monotonic() - began, 1)
            report.write(state)
    print(f"\n{report.table()}\n\n{MORE}")
    print(
        f"{verdict(report, args.device)}; {report.about['seconds']:.0f} s; {gpu_name(report) or about['machine']};"
        f" {args.json}"
    )
    return report.code


def verdict(report: Report, device: str) -> str:
    """One sentence's beginning: what it is, and why."""
    wrong = [f"{row.name} ({'target' if row.state == 'pass' else row.state})" for row in report.rows if row.wrong]
    said = f"{report.verdict}{': ' if wrong else ''}{', '.join(wrong)}"
    return said if device == "cuda" else f"dry run on the CPU, which says nothing of a GPU: {said}"


def gpu_name(report: Report) -> str:
    return next((row.facts.get("name", "") for row in report.rows if row.name == "device"), "")
