"""The shared volume: a folder for each run, a folder for each round, and `latest`; nothing in it is ever half-written.

    <adapters>/<run id>/round-0001/{adapter_config.json, adapter_model.safetensors, metrics.json, server_state.safetensors}
    <adapters>/<run id>/{history.json, status.json, samples.png, final/}
    <adapters>/latest -> <run id>, switched when a run has ended well

A round's folder is all that a run needs to go on from there: the adapter, the server optimiser's state, and in the history the
seed, the round's number, its metrics and who took part. Sites keep nothing between rounds (train.py).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from app.config import LORA_TARGETS, RunConfig
from app.errors import HubError
from app.model import Adapter, adapter_hash, check_adapter

STATE = "server_state.safetensors"
PREFIX = "base_model.model."  # PEFT's name for the model below the adapter


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step. It holds no NaN and no infinity, which are no JSON: ValueError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        _sync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_peft(folder: Path, adapter: Adapter, config: RunConfig) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` as PEFT reads them; alpha = rank."""
    save_file({PREFIX + key: value for key, value in adapter.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.base_model,
        "r": config.lora_rank,
        "lora_alpha": config.lora_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(LORA_TARGETS[config.lora_targets]),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a round's or the final folder."""
    return {key.removeprefix(PREFIX): value for key, value in load_file(folder / "adapter_model.safetensors").items()}


def write_folder(target: Path, fill: Callable[[Path], None], adapter: Adapter) -> None:
    """Fill a temporary folder, load its adapter back to see that it is whole, then rename it into place."""
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which nobody else who shares the volume could read
        with path.open("rb") as file:
            _sync(file.fileno())
    written = read_adapter(temporary)
    check_adapter(written, adapter)
    assert adapter_hash(written) == adapter_hash(adapter), "the adapter on disk is not the adapter in memory"
    _sync_folder(temporary)
    if target.exists():
        target.replace(old)
    temporary.replace(target)
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(target.parent)


def write_round(run: Path, number: int, adapter: Adapter, config: RunConfig, metrics: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """Round `number`'s adapter, metrics and server state; older rounds go by `keep-rounds`. Errors: HUB-09."""

    def fill(folder: Path) -> None:
        write_peft(folder, adapter, config)
        save_file(state, folder / STATE)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")

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
    """HUB-09 unless the volume has room for a round: the adapter twice, a server optimiser's two moments, the sites' replies, a little more."""
    needed = (4 + sites) * sum(value.nbytes for value in adapter.values()) + 2**24
    if (free := shutil.disk_usage(run).free) < needed:
        raise no_room(run, f"{free >> 20} MiB free, {needed >> 20} MiB needed")


def no_room(run: Path, found: str) -> HubError:
    """The error of a full volume."""
    return HubError(
        "HUB-09",
        "The shared volume has no room for another round.",
        found=f"{run}: {found}",
        fix="make room (older runs and rounds may be deleted; keep-rounds does it by itself), then run again with resume=\"latest\"",
    )


def written_rounds(run: Path) -> list[int]:
    """Numbers of the rounds that are whole, in order: a folder has its name only once it is complete."""
    return sorted(int(folder.name.removeprefix("round-")) for folder in run.glob("round-[0-9]*"))


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
            "There is no run to go on from.",
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
        _sync_folder(run.parent)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
