"""Adapters of every family as files: a run's own are read back, anybody's in each tool's names, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app import families, model
from app.adapter import formats
from app.config import RunConfig
from bouquet import cli
from bouquet.adapter import parity
from tests.kit import families as kit
from tests.kit import tiny

NAMES = [name for name in kit.ALL if name not in ("sd", "sd-v")]


def config(name: str, **changes) -> RunConfig:
    return replace(tiny.config(**kit.SETTINGS), base_model=name, **changes)


def trained(name: str, run: RunConfig) -> model.Adapter:
    """Every tensor random, so that it changes the picture."""
    draw = torch.Generator().manual_seed(3)
    fresh = model.new_adapter(kit.base(name), run)
    return {key: torch.randn(value.shape, generator=draw) * 0.3 for key, value in fresh.items()}


def finished(folder: Path, name: str, **changes) -> tuple[Path, model.Adapter, RunConfig]:
    """A run's folder with its final adapter, as the hub leaves it."""
    run = config(name, **changes)
    adapter, base = trained(name, run), kit.base(name)
    told = {
        "adapter_sha256": model.adapter_hash(adapter), "config": run.__dict__, "rounds": run.rounds,
        "base": {"name": name, "fingerprint": model.fingerprint(base)["base"]}, "versions": formats.versions(),
    }  # fmt: skip
    formats.write_final(folder, adapter, run, families.of(base), told)
    return folder, adapter, run


# --- a run's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_own_files_are_read_back_as_that_adapter_with_its_layers(tmp_path, name):
    for targets in families.of(kit.base(name)).targets:
        folder, adapter, run = finished(tmp_path / targets, name, lora_targets=targets)
        found, known = formats.open_adapter(folder, models=kit.models())
        assert tiny.equal(found, adapter) and known == run
        for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
            lora = formats.read_lora(folder / "final" / file, families.of(kit.base(name)), kit.base(name))
            assert tiny.equal(lora.adapter, adapter) and (lora.rank, lora.targets) == (2, targets)


def test_a_base_model_that_is_fetched_tells_its_family_by_its_name_and_nothing_is_fetched(tmp_path):
    family, folder = formats.family_of("z-image", tmp_path)
    assert (family.pipeline, folder) == ("ZImagePipeline", None)
    assert formats.family_of("my-own", tmp_path)[0].pipeline == "StableDiffusionPipeline"
    assert formats.family_of("../" + kit.base("zimage").name, tmp_path)[1] is None


def test_pictures_and_the_merged_model_are_made_of_a_transformers_run(tmp_path, capsys):
    folder, adapter, run = finished(tmp_path / "run", "zimage")
    asked = ["adapter", "sample", "--adapter", str(folder), "--models", str(kit.models())]
    assert cli.main([*asked, "--out", str(tmp_path / "s.png")]) == 0 and (tmp_path / "s.png").is_file()
    assert cli.main([*asked, "--merge", str(tmp_path / "merged")]) == 0
    assert "ZImagePipeline.from_pretrained" in capsys.readouterr().out
    steps = replace(run, sample_steps=2)
    by_us = parity.reference(kit.base("zimage"), adapter, steps)[1]
    assert np.abs(parity.drawn(parity.stock(tmp_path / "merged"), steps) - by_us).max() < 1e-3
