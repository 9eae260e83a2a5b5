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
import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from app import sample
from app.checkpoint import write_folder, write_peft
from app.config import LONGEST_PROMPT, LORA_TARGETS, MOST_PROMPTS, RunConfig
from app.errors import AdapterError
from app.model import Adapter, apply_adapter

PACKAGES = ("flwr", "torch", "diffusers", "peft", "accelerate", "transformers", "safetensors")
PEFT, DIFFUSERS, KOHYA = "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "kohya.safetensors"
FILES = (PEFT, "adapter_config.json", DIFFUSERS, KOHYA)

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
PARTS = {A: A, B: B, ALPHA: ALPHA, "lora_down.weight": A, "lora_up.weight": B, "lora.down.weight": A, "lora.up.weight": B}
KEY = re.compile(rf"(?:base_model\.model\.|unet\.)?(lora_unet_)?((?:down_blocks|mid_block|up_blocks).+?)\.({'|'.join(map(re.escape, PARTS))})")
TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors names them
WHOLE = ("I64", "I32", "I16", "I8", "U8")  # an alpha may be one of these as well
MOST_BYTES, MOST_NUMBERS, MOST_TENSORS = 2**31, 2**29, 10_000  # of a file; as float32 it is 2 GiB too
MOST_RANK = 512  # config.lora_rank's
MOST_NOTES = 2**26  # bytes of a JSON file beside it; the longest is a run's history
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

    Every tensor of the file is used or the file is refused, before a tensor is read where its header says why; another
    alpha is multiplied into B. That the adapter fits a base model is model.apply_adapter's to say. Errors: EXPORT-03.
    """
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise _unreadable(path, f"it is not there, no file, or larger than {MOST_BYTES >> 20} MiB")
        with safe_open(path, "pt") as file:
            notes, modules = file.metadata() or {}, _modules(path, file)
        rank, targets, common = _rank(path, modules), _targets(path, modules), _alpha(path, notes)
        adapter = {}
        for module, parts in modules.items():
            alpha = _number(path, parts[ALPHA].item()) if ALPHA in parts else common
            scale = 1.0 if alpha is None else alpha / rank
            adapter |= {f"{module}.{A}": parts[A].float(), f"{module}.{B}": parts[B].float() * scale}
    except AdapterError:
        raise
    except Exception as error:  # the file is anybody's, and its readers fail in many ways
        raise _unreadable(path, f"no safetensors file with a LoRA ({type(error).__name__} {error})") from error
    return Lora({key: adapter[key].contiguous() for key in sorted(adapter)}, rank, targets)


def _modules(path: Path, file: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Each module's A, B and perhaps alpha; nothing is read before all the header is found good. Errors: EXPORT-03."""
    keys, numbers = list(file.keys()), 0
    found: dict[str, dict[str, str]] = {}
    if len(keys) > MOST_TENSORS:
        raise _unreadable(path, f"it holds {len(keys)} tensors")
    for key in keys:
        if not (match := KEY.fullmatch(key)):
            raise _unreadable(path, f"{key} is no LoRA tensor of the UNet")
        module, part, about = _dotted(match[2]) if match[1] else match[2], PARTS[match[3]], file.get_slice(key)
        shape, kind = about.get_shape(), str(about.get_dtype())
        numbers += (size := math.prod(shape))
        right = kind in TYPES and len(shape) in (2, 4) and size > 0
        if part == ALPHA:
            right = kind in TYPES + WHOLE and size == 1
        if not right or numbers > MOST_NUMBERS:
            raise _unreadable(path, f"{key} is {kind} of shape {shape}")
        if part in found.setdefault(module, {}):
            raise _unreadable(path, f"{key} is there twice, by two names")
        found[module][part] = key
    return {module: {part: file.get_tensor(key) for part, key in parts.items()} for module, parts in found.items()}


def _rank(path: Path, modules: dict[str, dict[str, torch.Tensor]]) -> int:
    """The one rank of all modules. Errors: EXPORT-03."""
    if not modules or (halves := [name for name, parts in modules.items() if not {A, B} <= parts.keys()]):
        raise _unreadable(path, f"{halves[0]} has only one half" if modules else "it holds no tensors")
    ranks = {parts[A].shape[0] for parts in modules.values()} | {parts[B].shape[1] for parts in modules.values()}
    if len(ranks) > 1 or max(ranks) > MOST_RANK:
        listed = ", ".join(map(str, sorted(ranks)))
        raise _unreadable(path, f"ranks {listed} in one file, which may have one up to {MOST_RANK}")
    return ranks.pop()


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
        if notes.exists() and isinstance(config := _object(notes).get("config"), dict):
            known = {key.replace("_", "-"): value for key, value in config.items()}
            prompts = str(known.get("sample-prompts", "")).split("|")[:MOST_PROMPTS]  # an older run's may be more
            return known | {"sample-prompts": "|".join(prompt.strip()[:LONGEST_PROMPT] for prompt in prompts)}
    settings = folder / "adapter_config.json"
    base = _object(settings).get("base_model_name_or_path") if settings.exists() else None
    return {"base-model": base} if base else {}


def _object(path: Path, text: str | None = None) -> dict[str, Any]:
    """The JSON object in a file, or in a text that stands in it. Errors: EXPORT-03."""
    try:
        if text is None:
            if not path.is_file() or path.stat().st_size > MOST_NOTES:
                raise ValueError(f"no file, or larger than {MOST_NOTES >> 20} MiB")
            text = path.read_text()
        if isinstance(found := json.loads(text), dict):
            return found
        raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"its JSON cannot be read ({type(error).__name__} {error})") from None


def _number(path: Path, alpha: object) -> float:
    """An alpha. Errors: EXPORT-03, where it is no number, or none that a tensor can be multiplied by."""
    if type(alpha) not in (int, float) or not -1e6 < alpha < 1e6:
        raise _unreadable(path, f"its alpha is {str(alpha)[:40] if type(alpha) is not int else 'a large number'}")
    return float(alpha)


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
        settings = _object(beside)
    elif "lora_adapter_metadata" in notes:
        found = _object(path, notes["lora_adapter_metadata"])
        settings = {key.removeprefix("unet."): value for key, value in found.items()}
    if unknown := [key for key in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora") if settings.get(key)]:
        raise _unreadable(path, f"{unknown[0]} is set")
    alpha = settings.get("lora_alpha")
    return None if alpha is None else _number(path, alpha)


def _unreadable(path: Path, why: str) -> AdapterError:
    fix = "give a safetensors file with a plain LoRA of one rank on the UNet alone, in PEFT's, diffusers' or kohya's names"
    return AdapterError("EXPORT-03", "This LoRA cannot become an adapter.", found=f"{path}: {why[:500]}", fix=fix)
