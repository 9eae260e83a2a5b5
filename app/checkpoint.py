"""The shared volume: a folder for each run, a folder for each round, and `latest`; nothing in it is ever half-written.

    <adapters>/<run id>/round-0001/{adapter_config.json, adapter_model.safetensors, metrics.json}
    <adapters>/<run id>/{history.json, samples.png, final/}
    <adapters>/latest -> <run id>, switched when a run has ended well
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from app.config import LORA_TARGETS, RunConfig
from app.model import Adapter, adapter_hash, check_adapter

PREFIX = "base_model.model."  # PEFT's name for the model below the adapter


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
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


def write_round(run: Path, number: int, adapter: Adapter, config: RunConfig, metrics: dict[str, Any]) -> Path:
    """Round `number`'s adapter and metrics."""

    def fill(folder: Path) -> None:
        write_peft(folder, adapter, config)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")

    target = run / f"round-{number:04d}"
    write_folder(target, fill, adapter)
    return target


def point_latest(run: Path) -> None:
    """Switch `latest` to this run in one step."""
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
