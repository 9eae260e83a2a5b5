"""A run that begins with somebody's LoRA instead of a fresh adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from app import model
from app.adapter import formats, sample
from app.config import RunConfig
from app.errors import ConfigError
from app.families import sd
from tests.kit import tiny
from tests.kit.memory import Federation

BEGUN = tiny.adapter(9)


@pytest.fixture
def federation(tmp_path) -> Federation:
    """Two sites, and a kohya LoRA beside the runs."""
    federation = Federation(tmp_path, rounds=1, sample_prompts="", start_from="flowers.safetensors")
    formats.write_kohya(tmp_path, BEGUN, tiny.CONFIG, sd.FAMILY)
    (tmp_path / "kohya.safetensors").rename(federation.adapters / "flowers.safetensors")
    return federation


def test_the_sites_get_that_lora_in_the_first_round(federation, monkeypatch):
    federation.go(monkeypatch)
    sent = federation.grid.adapters("1", federation.grid.sent)
    assert set(sent) == {"site-1", "site-2"} and all(tiny.equal(adapter, BEGUN) for adapter in sent.values())
    history = federation.history()
    assert history["started_from"] == {"file": "flowers.safetensors", "adapter": model.adapter_hash(BEGUN)}
    assert history["rounds"][0]["started_from"] == model.adapter_hash(BEGUN)


def test_a_lora_of_a_larger_rank_is_refused_before_anybody_is_asked(federation, monkeypatch):
    federation.run_config["lora-rank"] = 1
    federation.fails(monkeypatch, "ADAPTER-01")
    assert federation.grid.sent == []


def product(adapter: model.Adapter, key: str) -> torch.Tensor:
    """B·A of a layer, by hand."""
    return adapter[key.replace("lora_A", "lora_B")].flatten(1) @ adapter[key].flatten(1)


def test_a_lora_of_a_smaller_rank_has_the_same_effect_and_every_rank_beyond_can_learn(federation, monkeypatch, capsys):
    federation.run_config["lora-rank"] = 4
    federation.go(monkeypatch)
    sent = federation.grid.adapters("1", federation.grid.sent)["site-1"]
    for key in (key for key in BEGUN if "lora_A" in key):
        assert torch.equal(product(sent, key), product(BEGUN, key)) and sent[key].shape[0] == 4
        assert sent[key].flatten(1).abs().amax(1).min() > 0  # with B = 0 as well a rank would stay 0 for ever
    assert "starting from flowers.safetensors" in capsys.readouterr().out


def test_layers_that_a_lora_does_not_have_begin_anew(federation, monkeypatch, capsys):
    some = {key: value for key, value in BEGUN.items() if ".attn2." in key}
    formats.write_kohya(federation.adapters, some, tiny.CONFIG, sd.FAMILY)
    (federation.adapters / "kohya.safetensors").rename(federation.adapters / "flowers.safetensors")
    federation.go(monkeypatch)
    sent = federation.grid.adapters("1", federation.grid.sent)["site-1"]
    assert all(torch.equal(value, (some if key in some else tiny.fresh())[key]) for key, value in sent.items())
    assert f"{len(some) // 2} of {len(sent) // 2} layers" in capsys.readouterr().out


BEYOND = ["unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", "text_encoder.encoder.layers.0.mlp.fc1"]


@pytest.mark.parametrize("layer", BEYOND)
def test_layers_that_no_run_trains_are_refused_by_name_before_anybody_is_asked(federation, monkeypatch, layer):
    beyond = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    tensors = {f"unet.{key}": value for key, value in BEGUN.items()} | beyond
    save_file(tensors, federation.adapters / "flowers.safetensors")
    found = federation.fails(monkeypatch, "EXPORT-03").found
    assert ("ff.net.2" if "ff" in layer else "text encoder") in found and federation.grid.sent == []


def test_an_alpha_that_only_the_file_beside_it_says_is_trained_from_too(federation, monkeypatch):
    tensors = {f"base_model.model.{key}": value for key, value in BEGUN.items()}
    save_file(tensors, federation.adapters / "flowers.safetensors")
    (federation.adapters / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}')  # half of alpha = rank
    federation.go(monkeypatch)
    assert tiny.equal(federation.grid.adapters("1", federation.grid.sent)["site-1"], sample.scaled(BEGUN, 0.5))


def test_a_file_that_is_not_there_is_named(federation, monkeypatch):
    (federation.adapters / "flowers.safetensors").unlink()
    assert "flowers.safetensors" in federation.fails(monkeypatch, "EXPORT-03").found


@pytest.mark.parametrize(
    "name", ["../flowers.safetensors", "/flowers.safetensors", "a/b.safetensors", "flowers.bin", ".safetensors"]
)
def test_no_path_and_no_other_format_is_taken(name):
    with pytest.raises(ConfigError, match="CONFIG-02"):
        RunConfig.read({"start-from": name})


def test_a_run_begins_or_goes_on_not_both():
    with pytest.raises(ConfigError, match="CONFIG-02"):
        RunConfig.read({"start-from": "flowers.safetensors", "resume": "latest"})
