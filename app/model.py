"""The base model by name, its fingerprint, and the adapter on its UNet.

Enters: a base model's name and the folder of base models. Leaves: a frozen UNet with a trainable LoRA adapter, and the
adapter as a plain dict of float32 tensors under PEFT's keys (`….lora_A.weight`), applied strictly and hashed.
Errors: MODEL-01 (unknown name), MODEL-02 (not on this machine), MODEL-03 (incomplete or damaged), ADAPTER-01 (does not
fit), ADAPTER-02 (not finite).

The fingerprint is of what is loaded: of weights that is safetensors alone, never a pickle or a copy in half precision.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from app.config import LORA_TARGETS, RunConfig
from app.errors import AdapterError, ModelError

HUB = {  # name: (repository, revision); a site may instead keep a folder of that name among its base models
    "stable-diffusion-v1-5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CLASSES = {  # what is loaded, and what a plain base model's index says; the scheduler's is in its own file too
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
WEIGHTS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.safetensors") | {"text_encoder": "model.safetensors"}
LOCAL = {"local_files_only": True, "use_safetensors": True}  # of every part that has weights
LARGEST = 64_000_000  # bytes of a text file: a tokenizer's are some
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
    """SHA-256 by part ('unet', 'vae', …) over names and bytes of what is loaded of it, and of all parts ('base').

    `memory` is a folder in which the sums are remembered by each file's place, size and times, so that gigabytes are
    read once. Errors: MODEL-03.
    """
    sums = {part: _remembered(_files(folder, part), memory) for part in PARTS}
    index, scheduler = read_json(folder / "model_index.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    plain = CLASSES | {"scheduler": ["diffusers", scheduler.get("_class_name")]}
    said = {key: index.get(key) for key in plain}
    other = json.dumps(said, sort_keys=True) if said != plain else ""  # so a plain one's is of its parts alone
    sums["base"] = hashlib.sha256(("".join(sums[part] for part in PARTS) + other).encode()).hexdigest()
    return sums


def is_base(folder: Path, base: str, known: str) -> bool:
    """Whether `known`, a fingerprint of other days, is this base model's; `base` is today's.

    At first it was of every .safetensors, .json and .txt file, with the ends of lines as they were, and of nothing
    else: kits and the histories of runs have kept such ones. For a plain base model the two are equal.
    """
    return known == base or known == _former(folder)


def _former(folder: Path) -> str:
    total = hashlib.sha256()
    for part in PARTS:
        files = (p for p in (folder / part).glob("*") if p.suffix in {".safetensors", ".json", ".txt"} and p.is_file())
        total.update(_sum(sorted(files), as_it_is=True).encode())
    return total.hexdigest()


def _files(folder: Path, part: str) -> list[Path]:
    """What is loaded of a part, by name. Errors: MODEL-03."""
    here, weights = folder / part, WEIGHTS.get(part)
    texts = {p for p in here.glob("*") if p.suffix in {".json", ".txt"}}
    if not texts:
        raise _incomplete(f"{folder} has no {part}/")
    files = texts if part == "tokenizer" else {here / ("config.json" if weights else "scheduler_config.json")}
    if weights:
        if (here / "adapter_config.json").exists():  # transformers would load what it names as well
            raise _incomplete(f"{here} has an adapter of its own")
        index = here / f"{weights}.index.json"
        shards = _shards(index) if index.exists() else set()
        files |= shards | ({index} if shards else set()) | ({here / weights} if (here / weights).exists() else set())
        if len(files) == 1:
            raise _incomplete(f"{here} has no weights as safetensors ({weights}); other formats are not read")
    if missing := sorted(p.name for p in files if not p.is_file()):
        raise _incomplete(f"{here} lacks {', '.join(missing)}"[:500])
    return sorted(files)


def _shards(index: Path) -> set[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_shard(name) for name in names.values()):
        raise _incomplete(f"{index} names no safetensors files beside it")
    return {index.parent / name for name in names.values()}


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _remembered(files: list[Path], memory: Path | None) -> str:
    """The files' sum, from `memory` where they are as they were."""
    if memory is None:
        return _sum(files)
    seen = [(str(p.resolve()), (s := p.stat()).st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in files]
    note = memory / f"sum-{hashlib.sha256(repr(('loaded', seen)).encode()).hexdigest()[:32]}.json"
    if note.exists():
        return json.loads(note.read_text())
    total = _sum(files)
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(total))
    temporary.replace(note)
    return total


def _sum(files: list[Path], as_it_is: bool = False) -> str:
    """SHA-256 over names and bytes, of text with lines ended as on Unix. Errors: MODEL-03, unless `as_it_is`."""
    total = hashlib.sha256()
    for path in files:
        if as_it_is or path.suffix == ".safetensors":
            if not as_it_is:
                with readable(path), safe_open(path, "pt"):  # its header
                    pass
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        else:
            if path.suffix == ".json":
                read_json(path)
            digest = hashlib.sha256(_text(path).replace(b"\r\n", b"\n")).digest()
        total.update(path.name.encode() + digest)
    return total.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """An object. Errors: MODEL-03."""
    with readable(path):
        found = json.loads(_text(path).decode())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    return found


def _text(path: Path) -> bytes:
    """Errors: MODEL-03."""
    if not path.is_file():
        raise _incomplete(f"{path} is missing, or no file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise _incomplete(f"{path} has more than {LARGEST} bytes")
    return data


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is read of a base model within. Errors: MODEL-03, whatever its reader says, unless it lacks GPU memory."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _incomplete(f"{path} cannot be read: {type(error).__name__} {error}"[:500]) from error


def _incomplete(found: str) -> ModelError:
    fix = f"copy the whole model in diffusers layout, weights as safetensors: {', '.join(PARTS)}, model_index.json"
    return ModelError("MODEL-03", "The base model is incomplete or damaged.", found=found, fix=fix)


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The UNet alone, frozen, without the rest of the pipeline. Errors: MODEL-03."""
    from diffusers import UNet2DConditionModel

    with readable(folder / "unet"):
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype, **LOCAL)
    return unet.requires_grad_(False)


def load_scheduler(folder: Path):
    """The model's noise schedule as a DDPMScheduler (training needs no other). Errors: MODEL-03."""
    from diffusers import DDPMScheduler

    settings = folder / "scheduler" / "scheduler_config.json"
    with readable(settings):
        steps = read_json(settings).get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= 100_000:
            raise ValueError("num_train_timesteps is no number from 1 to 100000")
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
