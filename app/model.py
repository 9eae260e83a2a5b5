"""The base model by name, its fingerprint, and the adapter on its UNet.

Enters: a base model's name and the folder of base models. Leaves: a frozen UNet with a trainable LoRA adapter, and the
adapter as a plain dict of float32 tensors under PEFT's keys (`….lora_A.weight`), applied strictly and hashed.
Errors: MODEL-01 (unknown name), MODEL-02 (not on this machine), MODEL-03 (incomplete), ADAPTER-01 (does not fit).
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from app.config import LORA_TARGETS, RunConfig
from app.errors import AdapterError, ModelError

HUB = {  # name: (repository, revision); a site may instead keep a folder of that name among its base models
    "stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
Adapter = dict[str, torch.Tensor]


def locate(name: str, models: Path) -> Path:
    """The folder of base model `name`: `models/name`, else the pinned revision of a known repository."""
    known = sorted({*HUB, *(p.parent.name for p in models.glob("*/model_index.json"))})
    if Path(name).name != name or name not in known:
        raise ModelError(
            "MODEL-01",
            "Unknown base model.",
            found=f"base-model = {name!r}; known here: {', '.join(known) or 'none'}",
            fix="choose a known name, or put the model in diffusers layout into a folder of that name among the base models",
        )
    folder = models / name
    if (folder / "model_index.json").exists():
        return folder
    from huggingface_hub import snapshot_download

    repository, revision = HUB[name]
    try:
        allow = [f"{part}/*" for part in PARTS] + ["model_index.json"]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=allow, ignore_patterns=["*.bin", "*fp16*", "*non_ema*"]))
    except Exception as error:
        raise ModelError(
            "MODEL-02",
            "The base model is not on this machine.",
            found=f"no folder {folder}, and {repository} at {revision[:8]} cannot be fetched ({type(error).__name__})",
            fix=f"put the model into {folder}, or allow this machine to reach the model hub",
        ) from error


def fingerprint(folder: Path, memory: Path | None = None) -> dict[str, str]:
    """SHA-256 by part ('unet', 'vae', …) over names and bytes of its files, and of all parts together ('base').

    `memory` is a folder in which the sums are remembered by size and modification time, so that gigabytes are read once.
    """
    sums: dict[str, str] = {}
    for part in PARTS:
        files = sorted(p for p in (folder / part).glob("*") if p.suffix in {".safetensors", ".json", ".txt"})
        if not files:
            raise ModelError(
                "MODEL-03",
                "The base model is incomplete.",
                found=f"{folder} has no {part}/",
                fix=f"copy the whole model in diffusers layout: {', '.join(PARTS)}",
            )
        stamp = hashlib.sha256(repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode()).hexdigest()
        note = memory / f"sum-{stamp[:32]}.json" if memory else None
        if note and note.exists():
            sums[part] = json.loads(note.read_text())
            continue
        total = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        sums[part] = total.hexdigest()
        if note:
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary = note.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(sums[part]))
            temporary.replace(note)
    sums["base"] = hashlib.sha256("".join(sums[part] for part in PARTS).encode()).hexdigest()
    return sums


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The UNet alone, frozen, without the rest of the pipeline."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, local_files_only=True)
    return unet.requires_grad_(False)


def load_scheduler(folder: Path):
    """The model's noise schedule as a DDPMScheduler (training needs no other)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


def lora_config(config: RunConfig):
    """PEFT's LoraConfig; alpha = rank, so that every file format agrees on the scale (1)."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank,
        target_modules=list(LORA_TARGETS[config.lora_targets]),
        init_lora_weights="gaussian",
    )


def add_adapter(unet: torch.nn.Module, config: RunConfig) -> None:
    """Put a fresh adapter (B = 0, A seeded by `config.seed`) on a frozen UNet, its parameters float32 and trainable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet.add_adapter(lora_config(config))
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapter_of(unet: torch.nn.Module) -> Adapter:
    """A copy of the adapter: PEFT's keys without the adapter's name, float32, on the CPU, in key order."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet)
    return {key: state[key].detach().to("cpu", torch.float32, copy=True).contiguous() for key in sorted(state)}


def check_adapter(adapter: Adapter, reference: Adapter) -> None:
    """AdapterError unless keys, shapes and types are those of `reference` and every number is finite."""
    missing, extra = sorted(reference.keys() - adapter.keys()), sorted(adapter.keys() - reference.keys())
    wrong = [k for k in adapter.keys() & reference.keys() if (adapter[k].shape, adapter[k].dtype) != (reference[k].shape, reference[k].dtype)]
    if missing or extra or wrong:
        raise AdapterError(
            "ADAPTER-01",
            "The adapter does not fit this model.",
            found=f"{len(missing)} keys missing, {len(extra)} extra, {len(wrong)} of another shape or type; first: {(missing + extra + sorted(wrong))[0]}",
            fix="use the same base-model, lora-rank and lora-targets as the run that made it",
        )
    if broken := [key for key, value in adapter.items() if not torch.isfinite(value).all()]:
        raise AdapterError(
            "ADAPTER-02",
            "The adapter has numbers that are not finite.",
            found=f"NaN or infinity in {len(broken)} of {len(adapter)} tensors; first: {broken[0]}",
            fix="lower learning-rate, or use precision = \"fp32\"",
        )


def apply_adapter(unet: torch.nn.Module, adapter: Adapter) -> str:
    """Load `adapter` strictly into the UNet's adapter; returns the hash of what the UNet then holds."""
    from peft import set_peft_model_state_dict

    check_adapter(adapter, adapter_of(unet))
    set_peft_model_state_dict(unet, adapter)
    return adapter_hash(adapter_of(unet))


def adapter_hash(adapter: Adapter) -> str:
    """SHA-256 over keys, shapes and little-endian bytes, in key order."""
    total = hashlib.sha256()
    for key in sorted(adapter):
        value = adapter[key].contiguous()
        total.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def new_adapter(folder: Path, config: RunConfig) -> Adapter:
    """The first global adapter of a run."""
    unet = load_unet(folder)
    add_adapter(unet, config)
    return adapter_of(unet)
