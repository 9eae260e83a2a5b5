"""How much memory a round takes, counted before any of it is taken.

Enters: a base model's folder and a run's config. Leaves: `Estimate`, in bytes. A training step, an evaluation and the
encoding of a photo are taken on torch's "meta" device, where tensors have a shape, a type and no contents: forward,
backward and what gradient checkpointing computes again, in the types that autocast gives on a GPU. What is alive at
once is counted, storage by storage, so the peak is derived and not guessed. No GPU is needed, and it takes seconds
whatever the batch.

Held against torch.cuda.max_memory_allocated on an H200 (Stable Diffusion 1.5's UNet of 859.5 M parameters, rank 8 on
attention, 512 pixels, bf16): 8 images a pass 10.3 GiB counted, 10.4 measured; 64 images 71.0 counted, 71 measured
(tests/test_memory_estimate.py).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from app import families, model
from app.config import RunConfig
from app.families.base import Conditions, Family, stacked
from app.site import diffusion, optimisers, quantised
from app.site.photos import views

GIB = 2**30
BLOCK = 512  # bytes to which torch's allocators round up
ROOM = 1.0 * GIB  # Python, torch, and CUDA's context of half a gibibyte to one, which no allocator of torch sees

# What comes and goes beside the counted peak, in times of it: the two numbers here that are measured and not derived.
ON_GPU = 1.05  # blocks that fit badly, kernels' own work space: one per cent with 8 images, see above
# glibc keeps and splits what is freed: mini, 64 images of 128²: 2.0 GiB counted, 3.5 taken (2.0 with
# MALLOC_MMAP_THRESHOLD_=131072)
ON_CPU = 2.0

# What torch.autocast("cuda", torch.bfloat16) computes in bfloat16 and what in float32, as far as diffusers' nets use
# it; all else keeps the types that come. Source: torch 2.13, ATen/autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP,
# AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE.
LOWER = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "matmul", "__matmul__", "mm", "bmm", "addmm",
    "baddbmm", "einsum", "scaled_dot_product_attention",
))  # fmt: skip
WHOLE = frozenset((
    "group_norm", "layer_norm", "rms_norm", "interpolate", "softmax", "log_softmax", "sum", "norm", "exp", "log",
    "pow", "__pow__", "rsqrt", "reciprocal", "mse_loss",
))  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Bytes. `floor`: alive for certain when a forward pass ends. `peak`: expected of torch's allocator, the most that
    it holds at once in a round (torch.cuda.max_memory_allocated). `need`: what should be free, with CUDA's context and
    whatever torch does not count.
    """

    floor: int
    peak: int
    need: int


def estimate(
    base: Path,
    config: RunConfig,
    *,
    half: bool,
    on_gpu: bool,
    evaluated: int = 1,
    encoded: int = 1,
    photos: int = 0,
) -> Estimate:
    """half: the base in bf16 under autocast (train.halved); bf16 on a CPU is
    counted as float32. evaluated: images in a pass of evaluation; encoded: photos in a pass of the autoencoder;
    photos: those kept encoded, in RAM.

    own   = net·(4 or 2 bytes; of codes 1, 0.53 and their scales) + adapter·16: its float32 numbers,
          gradients and AdamW's two moments (another optimizer's: optimisers.KEPT); 20 with proximal-mu
            + photos·(4·views·C·h·w + 2·conditions) on a CPU, where the site's memory is the device's
    with aspect-buckets and resolutions all of the largest shape; what is kept encoded is of each side.
    floor = own + what a forward pass leaves alive
    peak  = max(own + a step's most, net + the most of an evaluation, net + autoencoder + the most of an encoding,
                where codes take the place of numbers on a CPU: net + those numbers)
    need  = 1.05·peak + 1 GiB on a GPU, 2·peak + 1 GiB on a CPU
    """
    family = families.check(base)
    net = _net(base, family, config, half)
    trained = [p for p in net.parameters() if p.requires_grad]
    shape = views.largest(config, family.multiple)
    one = inputs(base, family, shape, 1)
    stored = (
        0
        if on_gpu
        else photos
        * (
            4 * most_views(config) * one.latents.numel() * sum(s * s for s in config.sides) // config.sides[-1] ** 2
            + sum(2 * x.numel() for x in one.given.values() if x.is_floating_point())
        )
    )
    weights, adapter = _bytes(net.parameters()) + stored, _bytes(trained)
    own = weights + adapter * (2 if config.proximal_mu else 1) + int(adapter / 4 * optimisers.KEPT[config.optimizer])
    kept, step = step_of(net, family, inputs(base, family, shape, config.batch_size), half=half)
    evaluation = forward_of(net.eval(), family, inputs(base, family, shape, evaluated), half=half)
    loading = 0 if on_gpu else weights + quantised.in_full(net)
    peak = max(own + step, weights + evaluation, weights + encoding_of(base, shape, encoded), loading)
    return Estimate(own + kept, peak, int((ON_GPU if on_gpu else ON_CPU) * peak + ROOM))


def most_views(config: RunConfig) -> int:
    """Views of a photo that are kept encoded."""
    return max(1, config.random_crops) * (2 if config.flip else 1)


def _net(base: Path, family: Family, config: RunConfig, half: bool) -> Any:
    """As train.load makes it, without contents."""
    import diffusers

    kind = getattr(diffusers, family.classes[family.net][0])
    settings = kind.load_config(str(base), subfolder=family.net, local_files_only=True)
    return without_contents(kind, settings, family, config, half)


def without_contents(kind: Any, settings: dict[str, Any], family: Family, config: RunConfig, half: bool) -> Any:
    """A net of that class and these settings, with the run's adapter, trained as train.load would have it."""
    with torch.device("meta"):
        net = kind.from_config(settings).requires_grad_(False)
        for parameter in net.parameters() if half else ():
            parameter.data = parameter.data.bfloat16()
        computes = torch.bfloat16 if half else torch.float32
        quantised.quantise(net, config.base_precision, computes, torch.device("meta"))
        model.add_adapter(net, family, config)
    if config.gradient_checkpointing:  # in diffusers' own way, but that the second time has OnGpu's types again
        types = lambda: (nullcontext(), OnGpu(half))  # noqa: E731
        net.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(
                block.__call__, *args, use_reentrant=False, preserve_rng_state=False, context_fn=types
            )
        )
    for parameter in net.parameters():
        # as in every pass but a step's first
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return net.train()


class Inputs(NamedTuple):
    """Of a net, on the meta device: latents [B, C, h, w], noise levels as it is told them [B], conditions."""

    latents: torch.Tensor
    told: torch.Tensor
    given: Conditions


def inputs(base: Path, family: Family, shape: views.Shape, count: int) -> Inputs:
    """Those of `count` photos of (height, width), by the settings of net, autoencoder and text encoders alone."""
    own = family.settings(base)
    with torch.device("meta"):
        vae = _autoencoder(base, family)
        z = family.latents(vae, torch.empty(1, 3, *shape))
        given = {name: torch.empty(shape) for name, shape in family.shapes(own, family.tokens(base)).items()}
        latents, told = torch.empty(count, *z.shape[1:]), torch.empty(count)
    return Inputs(latents, told, stacked([given] * count))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_of(net: Any, family: Family, of: Inputs, *, half: bool) -> tuple[int, int]:
    """(bytes alive when a step's forward pass ends, at most in the whole step), aside from parameters, their gradients
    and the inputs.
    """
    gradients = (p.grad for p in net.parameters() if p.grad is not None)
    alive = Alive([*net.parameters(), *gradients, of.latents, *of.given.values()])
    with alive:
        with OnGpu(half):
            predicted = diffusion.predict(net, family, *of)
            loss = F.mse_loss(predicted.float(), torch.empty_like(of.latents))
        kept = alive.now
        loss.backward()  # type: ignore[no-untyped-call]  # gradient checkpointing computes its blocks again in here
    return kept, alive.most


@torch.no_grad()
def forward_of(net: Any, family: Family, of: Inputs, *, half: bool) -> int:
    """Bytes alive at most in a forward pass without gradients, aside from parameters."""
    alive = Alive(net.parameters())
    with alive, OnGpu(half):
        diffusion.predict(net, family, *of)
    return alive.most


@torch.no_grad()
def encoding_of(base: Path, shape: views.Shape, count: int) -> int:
    """Bytes of the autoencoder (float32, as cache.py loads it) and of its encoding `count` photos."""
    family = families.of(base)
    with torch.device("meta"):
        vae = _autoencoder(base, family)
    photos = torch.empty(count, 3, *shape, device="meta")
    alive = Alive(vae.parameters())
    with alive, OnGpu(half=False):
        family.latents(vae, photos)
    return _bytes(vae.parameters()) + _bytes([photos]) + alive.most


def _autoencoder(base: Path, family: Family) -> Any:
    import diffusers

    kind = getattr(diffusers, family.classes["vae"][0])
    return kind.from_config(kind.load_config(str(base), subfolder="vae", local_files_only=True))


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made while it is entered that are still alive, `now` and at `most`; views and `known`
    tensors take none.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key not in self.known and key not in self.storages:
            self.now += size
            self.storages[key] = weakref.ref(storage, lambda _: self._end(key, size))

    def _end(self, key: int, size: int) -> None:
        del self.storages[key]
        self.now -= size


class OnGpu(TorchFunctionMode):
    """The forward pass as a GPU does it: with autocast's types where the base is kept in `half`, and attention in
    tiles.

    torch's own autocast passes the meta device over, and there its attention would write out the whole matrix.
    """

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if self.half and name in LOWER | WHOLE:
            to = torch.bfloat16 if name in LOWER else torch.float32
            cast = lambda x: x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
            args, kwargs = tree_map(cast, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not query.is_meta:
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    attended: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return attended


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
