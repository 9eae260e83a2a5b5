"""Whether every file of a final folder draws the same picture: a folder and its base model in; a table out, or
EXPORT-01.

Each path is what a person types: PEFT onto the UNet, `load_lora_weights` on the diffusers and on the kohya file, in
both precisions, and the merged pipeline from disk. The reference is the adapter as the app itself applies it while
training.

A path's number is the mean absolute difference of its picture from the reference, as a share of what the adapter
changes in the picture. LIMIT says how much is arithmetic and no fault. Measured on models/mini, trained, and on Stable
Diffusion 1.5's architecture: fp32 at most 0.00001 (rounding of W + BA in the merged weights), fp16 at most 0.0003;
alpha wrong by a factor of 2 gives 0.5 and more, one layer of 69 or 128 missing 0.006 and more.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from app import families, lora, model
from app.adapter import formats, sample, store
from app.adapter.lora_files import LoraFile
from app.adapter.sample import Pipeline
from app.config import RunConfig
from app.errors import AdapterError
from bouquet import progress

LIMIT = {"fp32": 0.001, "fp16": 0.005}
STEPS, SIDE = 4, 256  # denoising steps, and the largest side in pixels: a wrong file shows at once


class Drawn(NamedTuple):
    """A path, and how far its picture is from the reference as a share of the adapter's effect."""

    path: str
    precision: str
    difference: float

    @property
    def same(self) -> bool:
        return self.difference <= LIMIT[self.precision]


def stock(folder: Path) -> Pipeline:
    """A pipeline as anybody loads it, in float32 on the CPU."""
    import diffusers

    family = families.of(folder)
    kind: Pipeline = getattr(diffusers, family.pipeline)
    known = family.absent | {"local_files_only": True}
    pipe = kind.from_pretrained(folder, dtype=torch.float32, **known)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_peft(pipe: Pipeline, folder: Path) -> None:
    from peft import PeftModel

    net = PeftModel.from_pretrained(sample.net_of(pipe), folder).base_model.model
    setattr(pipe, sample.family_of(pipe).net, net)


def with_diffusers(pipe: Pipeline, folder: Path) -> None:
    pipe.load_lora_weights(folder)


def with_kohya(pipe: Pipeline, folder: Path) -> None:
    pipe.load_lora_weights(folder, weight_name=formats.KOHYA)


PATHS: dict[str, Callable[[Pipeline, Path], None]] = {
    "PEFT": with_peft,
    "diffusers": with_diffusers,
    "kohya": with_kohya,
}


def check(final: Path, base: Path, config: RunConfig) -> list[Drawn]:
    """Draw through every path and compare. Errors: EXPORT-01 when one differs, EXPORT-05 when the adapter changes
    nothing.
    """
    rows = list(progress.steps("comparing", differences(final, base, config), len(ways(base)) + 1))
    if wrong := [row for row in rows if not row.same]:
        shares = ", ".join(
            f"{row.path} {row.precision} {row.difference:.2%} (at most {LIMIT[row.precision]:.1%})" for row in wrong
        )
        fix = (
            "publish an untouched copy of the run's final folder; if it is one, provenance.json has the versions to"
            " report"
        )
        raise AdapterError("EXPORT-01", found=f"{final}: {shares}", fix=fix)
    return rows


def ways(base: Path) -> list[tuple[str, str]]:
    """(precision, path) of every file and way to load it."""
    paths = [path for path in PATHS if path != "kohya" or families.of(base).kohya]
    return [(precision, path) for precision in ("fp32", "fp16") for path in paths]


def differences(final: Path, base: Path, config: RunConfig) -> Iterator[Drawn]:
    """A row for each path. One pipeline is in memory at a time."""
    config = replace(config, sample_steps=STEPS, resolution=min(config.resolution, SIDE))
    adapter = store.read_adapter(final)
    plain, expected = reference(base, adapter, config)
    effect = np.abs(expected - plain).mean()
    if effect < 1 / 255:
        found = f"the picture with it and without it differ by {effect * 255:.2f} of 255 in the mean"
        raise AdapterError("EXPORT-05", found=found, fix="train it first")
    for precision, path in ways(base):
        pipe = stock(base)
        PATHS[path](pipe, final / "fp16" if precision == "fp16" else final)
        yield Drawn(path, precision, float(np.abs(drawn(pipe, config) - expected).mean() / effect))
        del pipe
        gc.collect()
    with tempfile.TemporaryDirectory(prefix="bouquet-merged-") as scratch:
        merged = Path(scratch)
        formats.merge(base, LoraFile(lora.folded(adapter, config), {}), merged)
        yield Drawn("merged", "fp32", float(np.abs(drawn(stock(merged), config) - expected).mean() / effect))


def reference(base: Path, adapter: model.Adapter, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """(the base model's picture, the picture under the adapter as training applies it)."""
    pipe = sample.pipeline(base, config, torch.device("cpu"))
    sample.net_of(pipe).disable_adapters()
    plain = drawn(pipe, config)
    sample.net_of(pipe).enable_adapters()
    model.apply_adapter(sample.net_of(pipe), adapter)
    expected = drawn(pipe, config)
    del pipe
    gc.collect()
    return plain, expected


def drawn(pipe: Pipeline, config: RunConfig) -> np.ndarray:
    """The first prompt's picture: float32 [side, side, 3] in [0, 1]."""
    seed = torch.Generator().manual_seed(config.seed)
    prompt = config.prompts[0] if config.prompts else ""
    side = {"height": config.resolution, "width": config.resolution}
    picture: np.ndarray = pipe(
        prompt=prompt,
        **side,
        num_inference_steps=config.sample_steps,
        **sample.family_of(pipe).drawing(config),
        generator=seed,
        output_type="np",
    ).images[0]
    return picture
