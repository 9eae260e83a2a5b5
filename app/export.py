"""One adapter, the files that other tools load; and such a file, one adapter.

    final/adapter_model.safetensors, adapter_config.json   PEFT       PeftModel.from_pretrained(unet, folder)
    final/pytorch_lora_weights.safetensors                 diffusers  pipe.load_lora_weights(folder)
    final/kohya.safetensors                                ComfyUI, A1111 and others that name tensors as kohya's trainer does
    final/provenance.json                                  the run, its sites, images, base model and versions
    final/fp16/                                            the same adapter files in half precision, half the size

alpha = rank in every file, so that each tool's alpha/rank is 1. Errors: EXPORT-02 (no adapter of a run), EXPORT-03 (a LoRA
that cannot become an adapter), EXPORT-04 (the folder for the merged model is in use).
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from app import sample
from app.checkpoint import write_folder, write_peft
from app.config import LORA_TARGETS, RunConfig
from app.errors import AdapterError
from app.model import Adapter, apply_adapter

PACKAGES = ("flwr", "torch", "diffusers", "peft", "accelerate", "transformers", "safetensors")
PEFT, DIFFUSERS, KOHYA = "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "kohya.safetensors"
FILES = (PEFT, "adapter_config.json", DIFFUSERS, KOHYA)

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
PARTS = {A: A, B: B, ALPHA: ALPHA, "lora_down.weight": A, "lora_up.weight": B, "lora.down.weight": A, "lora.up.weight": B}
KEY = re.compile(rf"(?:base_model\.model\.|unet\.)?(lora_unet_)?((?:down_blocks|mid_block|up_blocks).+?)\.({'|'.join(map(re.escape, PARTS))})")
JOINED = ("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out")


class Lora(NamedTuple):
    """An adapter (alpha = rank) and the run-config keys `lora-rank` and `lora-targets` that it fits."""

    adapter: Adapter
    rank: int
    targets: str


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


# --- writing -------------------------------------------------------------------------------------------------------------


def write_diffusers(folder: Path, adapter: Adapter, config: RunConfig) -> None:
    """`unet.`-prefixed PEFT keys, with rank and alpha in the metadata as diffusers reads them."""
    settings = {"r": config.lora_rank, "lora_alpha": config.lora_rank, "target_modules": list(LORA_TARGETS[config.lora_targets])}
    notes = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()}, sort_keys=True)}
    save_file({f"unet.{key}": value for key, value in adapter.items()}, folder / DIFFUSERS, metadata=notes)


def kohya_name(module: str) -> str:
    """`down_blocks.0.resnets.0.conv1` as kohya's trainer names it: `lora_unet_down_blocks_0_resnets_0_conv1`."""
    return "lora_unet_" + module.replace(".", "_")


def write_kohya(folder: Path, adapter: Adapter, config: RunConfig) -> None:
    """`lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha` for every layer; rank and alpha in the metadata too."""
    tensors = {}
    for key, value in adapter.items():
        module, part = key.rsplit(".lora_", 1)
        tensors[f"{kohya_name(module)}.{'lora_down' if part.startswith('A') else 'lora_up'}.weight"] = value
        tensors[f"{kohya_name(module)}.alpha"] = torch.tensor(float(config.lora_rank), dtype=value.dtype)
    rank = str(config.lora_rank)
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank, "ss_v2": "False"}
    if config.lora_targets == "attention+resnet":
        notes["ss_network_args"] = json.dumps({"conv_dim": rank, "conv_alpha": rank})
    save_file(tensors, folder / KOHYA, metadata={"format": "pt", "ss_sd_model_name": config.base_model} | notes)


def write_formats(folder: Path, adapter: Adapter, config: RunConfig) -> None:
    for write in (write_peft, write_diffusers, write_kohya):
        write(folder, adapter, config)


def write_final(run: Path, adapter: Adapter, config: RunConfig, provenance: dict[str, Any]) -> Path:
    """All formats of the adapter, each precision's in one step."""

    def fill(folder: Path) -> None:
        write_formats(folder, adapter, config)
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")

    final, half = run / "final", {key: value.half() for key, value in adapter.items()}
    write_folder(final, fill, adapter)
    write_folder(final / "fp16", lambda folder: write_formats(folder, half, config), half)
    return final


def merge(base: Path, adapter: Adapter, config: RunConfig, target: Path) -> None:
    """The base model with the adapter added to its UNet's weights: a pipeline folder that needs no LoRA. Errors: EXPORT-04."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError("EXPORT-04", "The folder for the merged model is in use.", found=f"{target} exists", fix="name a new folder")
    pipe = sample.pipeline(base, config, torch.device("cpu"))
    apply_adapter(pipe.unet, adapter)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    pipe.save_pretrained(target)


# --- reading -------------------------------------------------------------------------------------------------------------


def read_lora(path: Path) -> Lora:
    """A PEFT, diffusers or kohya LoRA of Stable Diffusion's UNet, in any precision, as a float32 adapter with alpha = rank.

    Every tensor of the file is used or the file is refused; another alpha is multiplied into B. That the adapter fits a base
    model is model.apply_adapter's to say. Errors: EXPORT-03.
    """
    try:
        with safe_open(path, "pt") as file:
            notes, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, f"no safetensors file ({type(error).__name__})") from error
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not (match := KEY.fullmatch(key)):
            raise _unreadable(path, f"{key} is no LoRA tensor of the UNet")
        module = _dotted(match[2]) if match[1] else match[2]
        modules.setdefault(module, {})[PARTS[match[3]]] = value.float()
    if not modules or (halves := [name for name, parts in modules.items() if not {A, B} <= parts.keys()]):
        raise _unreadable(path, f"{halves[0]} has only one half" if modules else "it holds no tensors")
    if len(ranks := {parts[A].shape[0] for parts in modules.values()} | {parts[B].shape[1] for parts in modules.values()}) > 1:
        raise _unreadable(path, f"ranks {', '.join(map(str, sorted(ranks)))} in one file")
    [rank], targets, common = ranks, _targets(path, modules), _alpha(path, notes)
    adapter = {}
    for module, parts in modules.items():
        scale = float(parts.get(ALPHA, common or rank)) / rank
        adapter |= {f"{module}.{A}": parts[A], f"{module}.{B}": parts[B] * scale}
    return Lora({key: adapter[key].contiguous() for key in sorted(adapter)}, rank, targets)


def open_adapter(path: Path, base_model: str = "") -> tuple[Adapter, RunConfig]:
    """The adapter of a run's folder, of one of its rounds, or of a LoRA file, and the configuration of its run.

    A file knows its rank and its layers; what it does not know (the base model, picture size) is `base_model` and the defaults.
    Errors: EXPORT-02, EXPORT-03.
    """
    folder = path / "final" if (path / "final").is_dir() else path
    file = folder if folder.is_file() else folder / PEFT
    if not file.exists():
        fix = "name a run's folder, one of its rounds, or a LoRA file; docker compose cp serverapp:/adapters ./adapters brings the runs here"
        raise AdapterError("EXPORT-02", "There is no adapter here.", found=f"{path} holds no {PEFT}", fix=fix)
    lora, known = read_lora(file), _run_config(file.parent)
    ours = {"lora-rank": lora.rank, "lora-targets": lora.targets} | ({"base-model": base_model} if base_model else {})
    return lora.adapter, RunConfig.read(known | ours)


def _run_config(folder: Path) -> dict[str, Any]:
    """The run's configuration by Flower's names: from its provenance, its history, or as much as PEFT's file says."""
    for notes in (folder / "provenance.json", folder.parent / "provenance.json", folder.parent / "history.json"):
        if notes.exists() and (config := json.loads(notes.read_text()).get("config")):
            return {key.replace("_", "-"): value for key, value in config.items()}
    settings = folder / "adapter_config.json"
    base = json.loads(settings.read_text()).get("base_model_name_or_path") if settings.exists() else None
    return {"base-model": base} if base else {}


def _dotted(flat: str) -> str:
    """Kohya's flat name back to the module's: only these words have an underscore of their own."""
    name = re.sub(r"\bto\.(q|k|v|out)\b", r"to_\1", flat.replace("_", "."))
    for word in JOINED:
        name = name.replace(word.replace("_", "."), word)
    return name


def _targets(path: Path, modules: dict[str, Any]) -> str:
    """The smallest choice of `lora-targets` that has all these layers."""
    for name, layers in LORA_TARGETS.items():
        if all(module.endswith(tuple(f".{layer}" for layer in layers)) for module in modules):
            return name
    strange = next(m for m in modules if not m.endswith(tuple(f".{layer}" for layer in LORA_TARGETS["attention+resnet"])))
    raise _unreadable(path, f"{strange} is not among the layers of lora-targets")


def _alpha(path: Path, notes: dict[str, str]) -> float | None:
    """The alpha that stands beside the tensors: in PEFT's config, or in diffusers' metadata; None where the file has none."""
    settings: dict[str, Any] = {}
    if path.name == PEFT and (beside := path.with_name("adapter_config.json")).exists():
        settings = json.loads(beside.read_text())
    elif "lora_adapter_metadata" in notes:
        settings = {key.removeprefix("unet."): value for key, value in json.loads(notes["lora_adapter_metadata"]).items()}
    if unknown := [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora") if settings.get(key)]:
        raise _unreadable(path, f"{unknown[0]} is set")
    return settings.get("lora_alpha")


def _unreadable(path: Path, why: str) -> AdapterError:
    fix = "give a safetensors file with a plain LoRA of one rank on the UNet alone, in PEFT's, diffusers' or kohya's names"
    return AdapterError("EXPORT-03", "This LoRA cannot become an adapter.", found=f"{path}: {why}", fix=fix)
