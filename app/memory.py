"""How much memory a training step takes, counted before any of it is taken.

Enters: a base model's folder and a run's config. Leaves: `Estimate`, in bytes. The UNet is built on torch's "meta" device,
where tensors have shapes and no contents, and goes forward once; what autograd keeps for the way back is counted to the
byte (on the CPU it is what a real step keeps, see tests/test_preflight.py). No GPU is needed, and it takes a second.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from app import model
from app.config import RunConfig

GIB = 2**30
ROOM = 1.0 * GIB  # Python, torch and CUDA's context and work space: an allowance, not a measurement
PASSING = 1.1  # times the kept activations: what comes and goes beside them, as measured on a CPU (mini, 64 images of 128²: 3.9 GiB, 1.86 kept)
ENCODER = 1.0 * GIB  # the autoencoder's activations for 512² pixels, which is what cache.py encodes at a time


@dataclass(frozen=True)
class Estimate:
    """`floor` is kept for certain: weights, adapter with gradients and AdamW's moments, activations, encoded photos.
    `need` adds the room for what comes and goes."""

    floor: int
    need: int


def estimate(base: Path, config: RunConfig, photos: int, half: bool) -> Estimate:
    """For `photos` encoded photos on the device; `half`: the base and the activations in bf16.

    floor = UNet·(4 or 2 bytes) + adapter·16 + activations·(1 or ½) + photos·4·(C·h·w + T·D)
    need  = max(floor + 1.1·activations, autoencoder + 1 GiB a 512² block) + 1 GiB
    """
    frozen, adapter, activations, numbers = _count(base, config)
    kept = activations // (2 if half else 1)
    floor = frozen * (2 if half else 4) + adapter * 16 + kept + photos * 4 * numbers
    encoding = _bytes(base / "vae") + ENCODER * max(1.0, config.resolution**2 / 512**2)
    return Estimate(int(floor), int(max(floor + PASSING * kept, encoding) + ROOM))


def _count(base: Path, config: RunConfig) -> tuple[int, int, int, int]:
    """(frozen parameters, adapter's parameters, bytes of float32 activations that one batch keeps, numbers of one encoded photo)."""
    from diffusers import UNet2DConditionModel

    settings = UNet2DConditionModel.load_config(base, subfolder="unet", local_files_only=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
        model.add_adapter(unet.requires_grad_(False), config)
    tokens = _settings(base / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    halvings = len(_settings(base / "vae" / "config.json")["block_out_channels"]) - 1  # of a picture's side on its way to latents
    batch, width, channels, size = config.batch_size, unet.config.cross_attention_dim, unet.config.in_channels, config.resolution >> halvings
    inputs = [torch.zeros(shape, device="meta") for shape in ((batch, channels, size, size), (batch,), (batch, tokens, width))]
    frozen, adapter = (sum(p.numel() for p in unet.parameters() if p.requires_grad == trained) for trained in (False, True))
    return frozen, adapter, kept_bytes(unet, *inputs), channels * size**2 + tokens * width


def _settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def kept_bytes(unet: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps of one forward pass, the parameters aside."""
    own = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FlashAttention():
        unet(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


class _FlashAttention(TorchFunctionMode):
    """Attention as a CPU and a GPU do it, in tiles; torch would write out the whole matrix on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return function(*args, **(kwargs or {}))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def free_ram() -> int:
    """Bytes that this machine, or this container's limit (cgroup v2), has left."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    machine = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        return min(machine, limit - int(stat["anon"]) - int(stat["kernel"]))
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max"
        return machine


def page_peak() -> int:
    """Most bytes of RAM that this process has ever had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
