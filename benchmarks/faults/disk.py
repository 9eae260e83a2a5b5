"""Disks that are full, a database that is locked, and an adapter whose writing is cut off.

The full volumes are small tmpfs mounts, which need root; without it these cases are skipped and say so.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import torch

from app import model
from app.adapter import store
from app.config import RunConfig
from app.families import sd
from app.hub import volume as volume_
from benchmarks import check
from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, World, lost
from benchmarks.faults.outcome import Outcome

SIZES = {"adapters": "160m", "state": "48m"}
LOCKED = 12  # seconds
FULL = 20  # seconds that the state volume is full
TENTHS = "SIGKILL in each tenth of the adapter's write"


@contextmanager
def small(folder: Path, size: str) -> Iterator[None]:
    """The folder as a tmpfs of that size, that goes when this process ends, killed too. OSError: why it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "bouquet-faults", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())
    unmount = ["sh", "-c", 'read -r _; exec umount --lazy "$0"', folder]  # reads until our end of the pipe is closed
    keeper = subprocess.Popen(unmount, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        keeper.communicate()
        assert keeper.returncode == 0, f"{folder} could not be unmounted"


@cache
def no_mount() -> str:
    """Why small volumes cannot be made here; '' where they can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small(Path(folder), "1m"):
                return ""
        except OSError as error:
            return f"no tmpfs can be mounted here ({error})"


def on_small(volume: str) -> World:
    """The deployment with one of its folders on a volume of its own."""

    @contextmanager
    def world(home: Path) -> Iterator[Bench]:
        with small(home / volume, SIZES[volume]), Bench(home) as bench:
            yield bench

    return world


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    file = folder / ".filler"
    with open(file, "wb", buffering=0) as filler:
        for size in (1 << 20, 4096, 1):
            try:
                while filler.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return file


def output_full(bench: Bench, run: str) -> Callable[[], None]:
    return fill(bench.adapters).unlink


def state_full(bench: Bench, run: str) -> None:
    """The SuperLink's database cannot grow, for a while."""
    file = fill(bench.home / "state")
    try:
        time.sleep(FULL)
    finally:
        file.unlink()


def locked(bench: Bench, run: str) -> None:
    """Somebody else has the SuperLink's database for himself."""
    with closing(sqlite3.connect(bench.home / "state" / "superlink.db", timeout=30, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(LOCKED)
        database.execute("ROLLBACK")


def adapter_write(case: Case, repeats: int) -> list[Outcome]:
    """Ten writings of round 2, each killed a tenth farther on: round 1 must still load, nothing is half-written, and
    the next writing succeeds.
    """
    return [_tenths() for _ in range(repeats)]


def _tenths() -> Outcome:
    config = RunConfig.read({})
    adapter = {f"{number}.lora_A.weight": torch.randn(400, 400) for number in range(24)}  # 15 MB
    problems, cut = [], 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        run = Path(folder) / "volume" / "1"
        volume_.write_round(run, 1, adapter, config, sd.FAMILY, {}, {})
        start = time.monotonic()
        volume_.write_round(run, 2, adapter, config, sd.FAMILY, {}, {})
        whole = time.monotonic() - start  # of the last writing: how long one takes changes with what else the disk does
        for tenth in range(10):
            rewritten = {key: value + tenth + 1 for key, value in adapter.items()}
            if not (child := os.fork()):
                volume_.write_round(run, 3, rewritten, config, sd.FAMILY, {}, {})
                os._exit(0)
            time.sleep(whole * (tenth + 0.5) / 10)
            os.kill(child, signal.SIGKILL)
            cut += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            problems += check.half_written(run.parent)
            for number, was in ((1, adapter), (2, adapter)):
                if model.adapter_hash(store.read_adapter(run / f"round-{number:04d}")) != model.adapter_hash(was):
                    problems.append(f"lost: round {number}")
            start = time.monotonic()
            volume_.write_round(run, 3, rewritten, config, sd.FAMILY, {}, {})
            whole = time.monotonic() - start
            if model.adapter_hash(store.read_adapter(run / "round-0003")) != model.adapter_hash(rewritten):
                problems.append("the next writing failed")
    problems += [f"only {cut} of 10 writings were cut off"] * (cut < 5)
    return Outcome(TENTHS, not problems, round(whole, 1), lost(problems), problems)


CASES = [
    Case("database", "the SuperLink's database locked for 12 s", locked),
    Case("disk", "the output volume full", output_full, on_small("adapters"), needs=no_mount),
    Case("disk", "the state volume full for 20 s", state_full, on_small("state"), needs=no_mount),
    Case("write", TENTHS, play=adapter_write),
]
