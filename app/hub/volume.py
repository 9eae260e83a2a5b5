"""The shared volume: a folder for each run, a folder for each round, and `latest`; nothing in it is ever half-written.

    <adapters>/<run id>/round-0001/{adapter_config.json, adapter_model.safetensors, metrics.json,
    server_state.safetensors} <adapters>/<run id>/{history.json, status.json, samples.png, final/} <adapters>/latest ->
    <run id>, switched when a run has ended well

A round's folder is all that a run needs to go on from there: the adapter, the server optimiser's state, and in the
history the seed, the round's number, its metrics and who took part. Sites keep nothing between rounds (train.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from app import files, records
from app.adapter.store import write_folder, write_peft
from app.config import RunConfig
from app.errors import HubError
from app.families.base import Family
from app.hub.history import Round
from app.model import Adapter

STATE, METRICS = "server_state.safetensors", "metrics.json"


def write_round(
    run: Path,
    number: int,
    adapter: Adapter,
    config: RunConfig,
    family: Family,
    metrics: dict[str, Any],
    state: dict[str, torch.Tensor],
) -> Path:
    """Round `number`'s adapter, metrics and server state; older rounds go by `keep-rounds`. Errors: HUB-09."""

    def fill(folder: Path) -> None:
        write_peft(folder, adapter, config, family)
        save_file(state, folder / STATE)
        (folder / METRICS).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")

    target = run / f"round-{number:04d}"
    try:
        write_folder(target, fill, adapter)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(target.with_name(f".{target.name}.tmp"), ignore_errors=True)
        raise no_room(run, f"round {number} could not be written ({type(error).__name__})") from error
    for old in written_rounds(run)[: -config.keep_rounds] if config.keep_rounds else ():
        shutil.rmtree(run / f"round-{old:04d}")
    return target


def check_room(run: Path, adapter: Adapter, sites: int) -> None:
    """HUB-09 unless the volume has room for a round: the adapter twice, a server optimiser's two moments, the
    average, the sites' replies, a little more.
    """
    needed = (5 + sites) * sum(value.nbytes for value in adapter.values()) + 2**24
    if (free := shutil.disk_usage(run).free) < needed:
        raise no_room(run, f"{free >> 20} MiB free, {needed >> 20} MiB needed")


def no_room(run: Path, found: str) -> HubError:
    """The error of a full volume."""
    return HubError(
        "HUB-09",
        found=f"{run}: {found}",
        fix=(
            "make room (older runs and rounds may be deleted; keep-rounds does it by itself), then run again with"
            ' resume="latest" and the rest of its configuration'
        ),
    )


def written_rounds(run: Path) -> list[int]:
    """Numbers of the rounds that are whole, in order: a folder has its name only once it is complete."""
    return sorted(int(folder.name.removeprefix("round-")) for folder in run.glob("round-[0-9]*"))


def told_rounds(run: Path) -> list[Round]:
    """What the folders of the whole rounds say of them, but for those of which it cannot be read."""
    found = []
    for number in written_rounds(run):
        with suppress(records.Unfit, OSError):
            found.append(records.read(Round, run / f"round-{number:04d}" / METRICS))
    return found


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """The server optimiser's state of a round's folder; {} where the strategy has none."""
    return load_file(folder / STATE)


def find_run(adapters: Path, which: str) -> Path:
    """The run `which`, or with `latest` the one that wrote a round last. Errors: HUB-08 when it has no whole round."""
    runs = [adapters / which] if which != "latest" else [p for p in adapters.iterdir() if p.name.isdecimal()]
    whole = [(run / f"round-{written_rounds(run)[-1]:04d}", run) for run in runs if written_rounds(run)]
    if not whole:
        raise HubError(
            "HUB-08",
            why="there is none",
            found=f"resume = {which!r}; no whole round in {adapters / which if which != 'latest' else adapters}",
            fix='give the id of a run on the shared volume, or leave resume out (resume="")',
        )
    return max(whole, key=lambda pair: pair[0].stat().st_mtime_ns)[1]


def take_over(source: Path, run: Path) -> None:
    """Every whole round of another run, as this one's own; links, since a round's files are never changed."""
    for number in written_rounds(source):
        name = f"round-{number:04d}"
        shutil.copytree(source / name, run / name, copy_function=os.link)


def point_latest(run: Path) -> None:
    """Switch `latest` to this run in one step; of two runs that end at once, the second waits for the first."""
    with (run.parent / ".latest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary = run.parent / f".latest-{run.name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.name)
        temporary.replace(run.parent / "latest")
        files.sync(run.parent)
