"""An adapter's folder, as PEFT reads it: adapter_model.safetensors and adapter_config.json.

Enters: an adapter and the run's config. Leaves: a folder that was read back before it got its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as serialised

from app import files, lora
from app.config import RunConfig
from app.families.base import Family
from app.model import Adapter, adapter_hash, check_adapter

PREFIX = "base_model.model."  # PEFT's name for the model below the adapter


def save_file(tensors: Adapter, path: Path, notes: dict[str, str]) -> None:
    """A safetensors file with notes in its metadata: of the same ones the same bytes. safetensors itself leaves the
    notes' order to chance.
    """
    whole = serialised(tensors, metadata={"format": "pt"})
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header["__metadata__"] |= dict(sorted(notes.items()))
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.write(memoryview(whole)[start:])


def write_peft(folder: Path, adapter: Adapter, config: RunConfig, family: Family) -> None:
    """`adapter_model.safetensors` and `adapter_config.json` as PEFT reads them."""
    save_file({PREFIX + key: value for key, value in adapter.items()}, folder / "adapter_model.safetensors", {})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.base_model,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    settings |= lora.settings(lora.ranks_of(adapter), family.targets[config.lora_targets], config)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a round's or the final folder."""
    return {key.removeprefix(PREFIX): value for key, value in load_file(folder / "adapter_model.safetensors").items()}


def write_folder(target: Path, fill: Callable[[Path], None], adapter: Adapter) -> None:
    """Fill a folder beside, load its adapter back to see that it is this one, then give it its name. Errors:
    ADAPTER-01, -02, OSError.
    """

    def check(folder: Path) -> None:
        written = read_adapter(folder)
        check_adapter(written, adapter)
        if adapter_hash(written) != adapter_hash(adapter):
            raise OSError(f"{folder / 'adapter_model.safetensors'}: what was read back is not what was written")

    files.write_folder(target, fill, check)
