"""The final folder: the same adapter as PEFT and as diffusers files, with its provenance.

Enters: the last round's adapter and what the run knows about itself. Leaves: `<run>/final/` with
`adapter_model.safetensors` + `adapter_config.json` (PEFT), `pytorch_lora_weights.safetensors` (diffusers:
`pipe.load_lora_weights(folder)`) and `provenance.json`.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from app.checkpoint import write_folder, write_peft
from app.config import LORA_TARGETS, RunConfig
from app.model import Adapter

PACKAGES = ("flwr", "torch", "diffusers", "peft", "accelerate", "transformers", "safetensors")


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def write_diffusers(folder: Path, adapter: Adapter, config: RunConfig) -> None:
    """`unet.`-prefixed PEFT keys, with rank and alpha in the metadata as diffusers reads them."""
    settings = {"r": config.lora_rank, "lora_alpha": config.lora_rank, "target_modules": list(LORA_TARGETS[config.lora_targets])}
    notes = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()}, sort_keys=True)}
    save_file({f"unet.{key}": value for key, value in adapter.items()}, folder / "pytorch_lora_weights.safetensors", metadata=notes)


def write_final(run: Path, adapter: Adapter, config: RunConfig, provenance: dict[str, Any]) -> Path:
    """All formats of the adapter, in one step."""

    def fill(folder: Path) -> None:
        write_peft(folder, adapter, config)
        write_diffusers(folder, adapter, config)
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")

    write_folder(run / "final", fill, adapter)
    return run / "final"
