"""A run that begins with somebody's LoRA instead of a fresh adapter."""

from __future__ import annotations

import pytest
import tiny

from app import export, model
from app.config import RunConfig
from app.errors import ConfigError
from tests.memory import Federation

BEGUN = tiny.adapter(9)


@pytest.fixture
def federation(tmp_path) -> Federation:
    """Two sites, and a kohya LoRA beside the runs."""
    federation = Federation(tmp_path, rounds=1, sample_prompts="", start_from="flowers.safetensors")
    export.write_kohya(tmp_path, BEGUN, tiny.CONFIG)
    (tmp_path / "kohya.safetensors").rename(federation.adapters / "flowers.safetensors")
    return federation


def test_the_sites_get_that_lora_in_the_first_round(federation, monkeypatch):
    federation.go(monkeypatch)
    sent = federation.grid.adapters("1", federation.grid.sent)
    assert set(sent) == {"site-1", "site-2"} and all(tiny.equal(adapter, BEGUN) for adapter in sent.values())
    history = federation.history()
    assert history["started_from"] == {"file": "flowers.safetensors", "adapter": model.adapter_hash(BEGUN)}
    assert history["rounds"][0]["started_from"] == model.adapter_hash(BEGUN)


def test_a_lora_of_another_rank_is_refused_before_anybody_is_asked(federation, monkeypatch):
    federation.run_config["lora-rank"] = 4
    federation.fails(monkeypatch, "ADAPTER-01")
    assert federation.grid.sent == []


def test_a_file_that_is_not_there_is_named(federation, monkeypatch):
    (federation.adapters / "flowers.safetensors").unlink()
    assert "flowers.safetensors" in federation.fails(monkeypatch, "EXPORT-03").found


@pytest.mark.parametrize("name", ["../flowers.safetensors", "/flowers.safetensors", "a/b.safetensors", "flowers.bin", ".safetensors"])
def test_no_path_and_no_other_format_is_taken(name):
    with pytest.raises(ConfigError, match="CONFIG-02"):
        RunConfig.read({"start-from": name})


def test_a_run_begins_or_goes_on_not_both():
    with pytest.raises(ConfigError, match="CONFIG-02"):
        RunConfig.read({"start-from": "flowers.safetensors", "resume": "latest"})
