"""One adapter, the files that other tools load; and such a file, one adapter.

    final/adapter_model.safetensors, adapter_config.json   PEFT       PeftModel.from_pretrained(net, folder)
    final/pytorch_lora_weights.safetensors                 diffusers  pipe.load_lora_weights(folder)
    final/kohya.safetensors                                of a UNet: ComfyUI, A1111, all that name layers as kohya does
    final/provenance.json                                  the run, its sites, images, base model and versions
    final/fp16/                                            the same adapter files in half precision, half the size

Each has the same strength in every tool: PEFT's and kohya's files say alpha, diffusers' has it in its B (app/lora.py).
Errors: EXPORT-02 (no adapter of a run), EXPORT-03 (a
LoRA that cannot be used, lora_files.py's), EXPORT-04 (the folder for the merged model is in use).
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from app import families, lora
from app.adapter import lora_files, sample
from app.adapter.lora_files import PEFT, SETTINGS, LoraFile, json_object
from app.adapter.store import read_adapter, save_file, write_folder, write_peft
from app.config import LONGEST_PROMPT, MOST_PROMPTS, RunConfig
from app.errors import AdapterError
from app.families import sd
from app.families.base import Family
from app.hub import history
from app.hub.history import UNKNOWN, Provenance
from app.model import Adapter

PACKAGES = ("flwr", "torch", "diffusers", "peft", "accelerate", "transformers", "safetensors")
DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "kohya.safetensors"


class Lora(NamedTuple):
    """An adapter (alpha = rank) and the run-config keys `lora-rank` and `lora-targets` that it fits."""

    adapter: Adapter
    rank: int
    targets: str


def files(family: Family) -> tuple[str, ...]:
    """What a final folder has of an adapter, and `fp16/` in it."""
    return (PEFT, SETTINGS, DIFFUSERS, *((KOHYA,) if family.kohya else ()))


def net_of(family: Family) -> str:
    """What the trained part is called in a sentence."""
    return "UNet" if family.net == "unet" else family.net


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


# --- writing ----------------------------------------------------------------------------------------------------------


def write_diffusers(folder: Path, adapter: Adapter, config: RunConfig, family: Family) -> None:
    """PEFT keys after the net's name (`unet.`, `transformer.`), B at its strength: alpha is the rank in the metadata,
    and taken for it by tools that do not read that (ComfyUI).
    """
    settings = lora.settings(lora.ranks_of(adapter), family.targets[config.lora_targets], lora.plain(config))
    own = {
        "lora_adapter_metadata": json.dumps({f"{family.net}.{k}": v for k, v in settings.items()}, sort_keys=True),
    }
    notes = described(adapter, config, family) | own
    strong = lora.folded(adapter, config)
    save_file({f"{family.net}.{key}": value for key, value in strong.items()}, folder / DIFFUSERS, notes)


def described(adapter: Adapter, config: RunConfig, family: Family) -> dict[str, str]:
    """What model sites and tools read to know what a file is for: Stability's ModelSpec, and the family's own notes.

    Of a run only what is the same each time: no date.
    """
    spec = {
        "sai_model_spec": "1.0.0",
        "title": f"LoRA of {config.base_model}",
        "implementation": "diffusers",
        "resolution": f"{config.resolution}x{config.resolution}",
    }
    spec |= {"trigger_phrase": word} if (word := config.trigger_word.strip()) else {}
    return {f"modelspec.{key}": value for key, value in spec.items()} | family.notes(config, adapter)


def kohya_name(module: str) -> str:
    """`down_blocks.0.resnets.0.conv1` as kohya's trainer names it: `lora_unet_down_blocks_0_resnets_0_conv1`."""
    return "lora_unet_" + module.replace(".", "_")


def write_kohya(folder: Path, adapter: Adapter, config: RunConfig, family: Family) -> None:
    """`lora_unet_….lora_down.weight`, `.lora_up.weight` and `.alpha` for every layer; rank and alpha in the metadata
    too. Tools take alpha / rank for the strength. It is one alpha for all layers, since diffusers loses others of
    attention layers; where that is not a layer's strength, its B has the rest.
    """
    tensors, alpha = {}, config.lora_rank * lora.scale(config.lora_rank, config)
    for key, value in lora.folded(adapter, config, alpha).items():
        module, part = key.rsplit(".lora_", 1)
        tensors[f"{kohya_name(module)}.{'lora_down' if part.startswith('A') else 'lora_up'}.weight"] = value
        tensors[f"{kohya_name(module)}.alpha"] = torch.tensor(alpha, dtype=value.dtype)
    dim, told = str(config.lora_rank), f"{alpha:g}"
    notes = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": told, "ss_v2": "False"}
    notes |= described(adapter, config, family)
    if config.lora_targets == "attention+resnet":
        notes["ss_network_args"] = json.dumps({"conv_dim": dim, "conv_alpha": told})
    save_file(tensors, folder / KOHYA, {"ss_sd_model_name": config.base_model} | notes)


def write_formats(folder: Path, adapter: Adapter, config: RunConfig, family: Family) -> None:
    for write in (write_peft, write_diffusers, *((write_kohya,) if family.kohya else ())):
        write(folder, adapter, config, family)


def write_final(
    run: Path, adapter: Adapter, config: RunConfig, family: Family, provenance: Provenance = UNKNOWN
) -> Path:
    """All formats of the adapter, each precision's in one step."""

    def fill(folder: Path) -> None:
        write_formats(folder, adapter, config, family)
        history.write(folder / history.PROVENANCE, provenance)

    final, half = run / "final", {key: value.half() for key, value in adapter.items()}
    write_folder(final, fill, adapter)
    write_folder(final / "fp16", lambda folder: write_formats(folder, half, config, family), half)
    return final


def merge(base: Path, file: LoraFile, target: Path) -> None:
    """The base model with the LoRA in its weights: a pipeline folder that needs no LoRA.

    Errors: EXPORT-04, ADAPTER-01.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError("EXPORT-04", found=f"{target} exists", fix="name a new folder")
    pipe = sample.dressed(base, file, torch.device("cpu"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(target)


# --- reading ----------------------------------------------------------------------------------------------------------


def family_of(name: str, models: Path | None) -> tuple[Family, Path | None]:
    """A base model's family by its name, and its folder where that is here. Nothing is fetched; an unknown name is
    taken for Stable Diffusion's.

    Errors: MODEL-03, MODEL-05.
    """
    if models and Path(name).name == name and (models / name / "model_index.json").exists():
        return families.of(models / name), models / name
    return next((family for family in families.FAMILIES.values() if name in family.repositories), sd.FAMILY), None


def read_lora(path: Path, family: Family = sd.FAMILY, base: Path | None = None) -> Lora:
    """A LoRA file as an adapter that a run can train: the net's alone, in layers of `lora-targets`.

    Errors: EXPORT-03.
    """
    file = lora_files.read(path, family, base)
    layers = sorted({key.rsplit(".lora_", 1)[0] for key in file.net})
    ends = {targets: tuple(f".{layer}" for layer in chosen) for targets, chosen in family.targets.items()}
    widest = list(ends)[-1]
    strange = [layer for layer in layers if not f".{layer}".endswith(ends[widest])]
    beyond = [f"{len(strange)} that lora-targets does not have, like {strange[0]}"] if strange else []
    if file.text:
        beyond.append(f"{len(file.text) // 2} of the text encoder, which no run trains")
    if beyond:
        raise AdapterError(
            "EXPORT-03",
            found=f"{path}: beside the {net_of(family)}'s layers that a run can train it has {' and '.join(beyond)}"[
                :500
            ],
            fix=(
                "start from a LoRA of those layers alone (what was learned together is torn apart); bouquet adapter"
                " sample draws it"
            ),
        )
    targets = next(targets for targets in ends if all(f".{layer}".endswith(ends[targets]) for layer in layers))
    return Lora(file.net, next(iter(file.net.values())).shape[0], targets)


def open_adapter(path: Path, base_model: str = "", models: Path | None = None) -> tuple[Adapter, RunConfig]:
    """The adapter of a run's folder, of a round's, or of a LoRA file that a run could train, and its run's
    configuration.

    A file knows its rank and its layers; what it does not know (the base model, picture size) is `base_model` and the
    defaults. Whose family it is of, the base model says (`family_of`), among `models`.
    Errors: EXPORT-02, EXPORT-03, MODEL-03, MODEL-05.
    """
    file = adapter_file(path)
    known, of_base = _known(file, base_model, models)
    read, run = read_lora(file, *of_base), RunConfig.read(known)
    if file.name == PEFT and run != lora.plain(run):  # a run's own: what it trained, with its own alpha and ranks
        return read_adapter(file.parent), run
    told = {"lora-rank": read.rank, "lora-targets": read.targets}
    return read.adapter, lora.plain(RunConfig.read(known | told))


def open_file(path: Path, base_model: str = "", models: Path | None = None) -> tuple[LoraFile, RunConfig]:
    """As `open_adapter`, of any LoRA file that can be read, trainable here or not: for pictures."""
    file = adapter_file(path)
    known, of_base = _known(file, base_model, models)
    return lora_files.read(file, *of_base), RunConfig.read(known)


def _known(file: Path, base_model: str, models: Path | None) -> tuple[dict[str, Any], tuple[Family, Path | None]]:
    """(the run's configuration, its base model's family and folder)."""
    known = _run_config(file.parent) | ({"base-model": base_model} if base_model else {})
    name = RunConfig.read({key: value for key, value in known.items() if key == "base-model"}).base_model
    return known, family_of(name, models)


def adapter_file(path: Path) -> Path:
    """Errors: EXPORT-02."""
    folder = path / "final" if (path / "final").is_dir() else path
    file = folder if folder.is_file() else folder / PEFT
    if not file.exists():
        fix = (
            "name a run's folder, one of its rounds, or a LoRA file; docker compose cp serverapp:/adapters ./adapters"
            " brings the runs here"
        )
        raise AdapterError("EXPORT-02", found=f"{path} holds no {PEFT}", fix=fix)
    return file


def _run_config(folder: Path) -> dict[str, Any]:
    """The run's configuration by Flower's names: from its provenance, its history, or as much as PEFT's file says."""
    for notes in (folder / history.PROVENANCE, folder.parent / history.PROVENANCE, folder.parent / history.FILE):
        if notes.exists() and (config := json_object(notes).get("config")) and isinstance(config, dict):
            known = {key.replace("_", "-"): value for key, value in config.items()}
            prompts = str(known.get("sample-prompts", "")).split("|")[:MOST_PROMPTS]  # an older run's may be more
            return known | {"sample-prompts": "|".join(prompt.strip()[:LONGEST_PROMPT] for prompt in prompts)}
    settings = folder / SETTINGS
    base = json_object(settings).get("base_model_name_or_path") if settings.exists() else None
    return {"base-model": base} if base else {}
