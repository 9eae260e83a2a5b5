"""An adapter's alpha, its scaling and its layers' ranks: what they do is a number, and every file says the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from app import families, lora, model
from app.adapter import formats, lora_files, sample
from app.config import RunConfig
from app.errors import AdapterError, BouquetError
from app.families import sd
from app.hub.history import Provenance
from app.site.limits import Limits
from bouquet.adapter import parity
from bouquet.site import estimate
from tests.kit import families as kit
from tests.kit import tiny
from tests.kit.memory import Federation

# diffusers' Euler under numpy 2.4
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PATTERN = "attn2=3,down_blocks=1"
ONE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = ONE.replace("attn1", "attn2")
SHAPES = {  # run-config keys: the scale of a layer of rank 2, and of one of rank 3, by hand
    "alpha 4": ({"lora_alpha": 4.0}, 2.0, 4 / 3),
    "alpha 1": ({"lora_alpha": 1.0}, 0.5, 1 / 3),
    "rs": ({"lora_scaling": "rs"}, math.sqrt(2), math.sqrt(3)),
    "rs, alpha 4": ({"lora_scaling": "rs", "lora_alpha": 4.0}, 4 / math.sqrt(2), 4 / math.sqrt(3)),
    "ranks": ({"rank_pattern": PATTERN}, 1.0, 1.0),
    "ranks, alpha 4": ({"rank_pattern": PATTERN, "lora_alpha": 4.0}, 2.0, 4 / 3),
    "all": ({"rank_pattern": PATTERN, "lora_alpha": 4.0, "lora_scaling": "rs"}, 4 / math.sqrt(2), 4 / math.sqrt(3)),
}


def drawn(seed: int, base, config: RunConfig) -> model.Adapter:
    draw = torch.Generator().manual_seed(seed)
    fresh = model.new_adapter(base, config)
    return {key: torch.randn(value.shape, generator=draw) * 0.3 for key, value in fresh.items()}


# --- on the net -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_net_counts_ba_as_often_as_it_says_by_hand(shape):
    changes, of_two, of_three = SHAPES[shape]
    config = tiny.config(**changes)
    by_rank = {2: of_two, 3: of_three}
    assert [lora.scale(rank, config) for rank in by_rank] == pytest.approx(list(by_rank.values()))
    layers = {name: layer for name, layer in tiny.unet(config).named_modules() if hasattr(layer, "lora_A")}
    for name, layer in layers.items():
        rank = layer.lora_A["default"].weight.shape[0]
        assert layer.scaling["default"] == pytest.approx(lora.scale(rank, config)), name
    assert layers[ONE.replace("down_blocks.1", "mid_block")].scaling["default"] == pytest.approx(of_two)


def test_the_first_words_that_fit_are_a_layers_rank_and_the_rest_have_lora_rank():
    ranks = lora.ranks_of(tiny.fresh(tiny.config(rank_pattern=PATTERN)))
    assert (ranks[OTHER], ranks[ONE]) == (3, 1)  # attn2 comes before down_blocks
    assert ranks[ONE.replace("down_blocks.1", "mid_block")] == 2
    by_peft = LoraConfig(**lora.settings(ranks, ["to_q"], tiny.config(rank_pattern=PATTERN)))
    assert by_peft.rank_pattern[f"^{OTHER}"] == 3 and not any(
        "mid_block" in key and "attn1" in key for key in by_peft.rank_pattern
    )


def test_half_a_word_fits_nothing_and_says_so():
    with pytest.raises(BouquetError, match="CONFIG-05") as caught:
        model.new_adapter(tiny.base(), tiny.config(rank_pattern="attn=3"))
    assert "'attn'" in caught.value.found and "transformer_blocks" in caught.value.found


@pytest.mark.parametrize("value", ["attn2", "attn2=0", "attn2=513", "attn2=3;to_q=4", "attn 2=3", "=3", "a=1,"])
def test_a_pattern_that_is_none_is_refused(value):
    with pytest.raises(BouquetError, match="CONFIG-02"):
        RunConfig.read({"rank-pattern": value})


def test_a_site_bounds_the_largest_rank_of_a_pattern_too():
    config = RunConfig.read({"lora-rank": 8, "rank-pattern": "attn2=16"})
    Limits.read("max-lora-rank=16 min-lora-rank=8").check(config)
    for limit in ("max-lora-rank=15", "min-lora-rank=9"):
        with pytest.raises(BouquetError, match="TRUST-03"):
            Limits.read(limit).check(config)


def test_the_estimate_counts_each_layers_own_rank():
    """fp32 numbers, gradients and two moments: 16 bytes a number that is trained."""
    config = tiny.config(lora_targets="attention")
    one, other = (
        estimate.estimate(tiny.base(), config, half=False, on_gpu=True)
        for config in (config, replace(config, rank_pattern="attn2=34"))
    )
    fresh = tiny.fresh(config)
    more = sum(value.numel() // 2 * 32 for key, value in fresh.items() if ".attn2." in key)
    assert other.floor - one.floor >= 16 * more


# --- in files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"), [("sd", "alpha 4"), ("sd", "rs"), ("sd", "ranks"), ("sd", "all"), ("flux", "all")]
)
def test_every_loader_draws_the_picture_that_training_meant(tmp_path, monkeypatch, shape, name):
    monkeypatch.setattr(parity, "STEPS", 2)  # a wrong number shows in each
    base, changes = kit.base(name), dict(SHAPES[shape][0])
    if name == "flux" and "rank_pattern" in changes:
        changes["rank_pattern"] = "to_q=3,single_transformer_blocks=1"
    config = replace(tiny.config(**kit.SETTINGS), base_model=name, lora_targets="attention", **changes)
    adapter = drawn(3, base, config)
    told = Provenance(config=config.__dict__)
    final = formats.write_final(tmp_path, adapter, config, families.of(base), told)
    rows = {(row.path, row.precision): row.difference for row in parity.check(final, base, config)}
    assert {path for path, _ in rows} == {"PEFT", "diffusers", "merged"} | ({"kohya"} if name == "sd" else set())
    assert max(value for (_, precision), value in rows.items() if precision == "fp32") < 1e-4
    found, known = formats.open_adapter(tmp_path, models=kit.models())
    assert tiny.equal(found, adapter) and known == config


def test_a_power_of_two_is_the_same_picture_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "STEPS", 2)
    config = tiny.config(lora_alpha=4.0)
    final = formats.write_final(tmp_path, tiny.adapter(3, config), config, sd.FAMILY)
    rows = {row.path: row.difference for row in parity.check(final, tiny.base(), config) if row.precision == "fp32"}
    assert (rows["PEFT"], rows["diffusers"], rows["kohya"]) == (0.0, 0.0, 0.0)


def test_tools_that_read_no_metadata_take_diffusers_file_at_its_strength(tmp_path):
    """ComfyUI: alpha / rank is 1 where there is no tensor `.alpha`."""
    config = tiny.config(lora_alpha=4.0)
    adapter = tiny.adapter(3, config)
    formats.write_diffusers(tmp_path, adapter, config, sd.FAMILY)
    tensors = load_file(tmp_path / formats.DIFFUSERS)
    assert torch.equal(tensors[f"unet.{ONE}.lora_B.weight"], adapter[f"{ONE}.lora_B.weight"] * 2)
    assert torch.equal(tensors[f"unet.{ONE}.lora_A.weight"], adapter[f"{ONE}.lora_A.weight"])


def test_kohyas_file_says_alpha_so_that_over_rank_it_is_the_strength(tmp_path):
    config = tiny.config(lora_alpha=4.0, lora_scaling="rs", rank_pattern=PATTERN)
    formats.write_kohya(tmp_path, tiny.adapter(3, config), config, sd.FAMILY)
    tensors = load_file(tmp_path / formats.KOHYA)
    alphas = {value.item() for key, value in tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == 1 and alphas.pop() == pytest.approx(4 * math.sqrt(2))  # over 2 it is 4 / √2
    b = {layer: tensors[f"{formats.kohya_name(layer)}.lora_up.weight"] for layer in (ONE, OTHER)}
    key = f"{OTHER}.lora_B.weight"  # 4 / √3 times, of which 4·√2 / 3 are alpha's
    torch.testing.assert_close(b[OTHER], tiny.adapter(3, config)[key] * (4 / math.sqrt(3)) / (4 * math.sqrt(2) / 3))
    key = f"{ONE}.lora_B.weight"  # 4 / √1 times, of which 4·√2 / 1 are alpha's
    torch.testing.assert_close(b[ONE], tiny.adapter(3, config)[key] / math.sqrt(2))
    with safe_open(tmp_path / formats.KOHYA, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "2"
        assert float(file.metadata()["ss_network_alpha"]) == pytest.approx(4 * math.sqrt(2), rel=1e-5)


def test_pefts_settings_say_it_in_pefts_own_words(tmp_path):
    config = tiny.config(lora_alpha=4.0, lora_scaling="rs", rank_pattern="attn2=3")
    formats.write_peft(tmp_path, tiny.adapter(3, config), config, sd.FAMILY)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (2, 4, True) and "alpha_pattern" not in told
    assert set(told["rank_pattern"].values()) == {3} and all(".attn2." in key for key in told["rank_pattern"])
    unet = PeftModel.from_pretrained(model.load_net(tiny.base()), tmp_path)
    layer = unet.get_submodule(f"base_model.model.{OTHER}")
    assert layer.scaling["default"] == pytest.approx(4 / math.sqrt(3))


# --- begun with -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_begins_with_anothers_file_at_the_files_strength_whatever_either_alpha(tmp_path, shape):
    theirs, ours = tiny.config(lora_alpha=1.0), tiny.config(lora_rank=4, **SHAPES[shape][0])
    ours = replace(ours, rank_pattern="attn2=3,down_blocks=2" if ours.rank_pattern else "")
    adapter, fresh = tiny.adapter(9, theirs), tiny.fresh(ours)
    formats.write_peft(tmp_path, adapter, theirs, sd.FAMILY)
    read = formats.read_lora(tmp_path / "adapter_model.safetensors").adapter
    begun = lora_files.begun(read, fresh, lora.scales(fresh, ours))
    model.check_adapter(begun, fresh)
    strong, wanted = lora.folded(begun, ours), lora.folded(adapter, theirs)
    for layer in lora.ranks_of(adapter):
        products = [
            one[f"{layer}.lora_B.weight"].flatten(1) @ one[f"{layer}.lora_A.weight"].flatten(1)
            for one in (strong, wanted)
        ]
        torch.testing.assert_close(*products)


def test_a_run_begins_with_its_own_kind_of_file_whose_layers_have_several_ranks(tmp_path):
    config = tiny.config(rank_pattern=PATTERN, lora_alpha=4.0)
    adapter, fresh = tiny.adapter(9, config), tiny.fresh(config)
    for write in (formats.write_peft, formats.write_diffusers, formats.write_kohya):
        write(tmp_path, adapter, config, sd.FAMILY)
    for name in ("adapter_model.safetensors", formats.DIFFUSERS, formats.KOHYA):
        begun = lora_files.begun(formats.read_lora(tmp_path / name).adapter, fresh, lora.scales(fresh, config))
        for key, value in adapter.items():
            torch.testing.assert_close(begun[key], value)


@pytest.mark.slow
def test_a_run_cannot_go_on_with_another_alpha_and_can_from_before_there_was_one(tmp_path, monkeypatch):
    federation = Federation(tmp_path, rounds=1, sample_prompts="")
    run = federation.go(monkeypatch)
    history = json.loads((run / "history.json").read_text())
    for key in ("lora_alpha", "lora_scaling", "rank_pattern"):
        del history["config"][key]
    (run / "history.json").write_text(json.dumps(history))
    federation.run_config |= {"resume": "7", "rounds": 2, "lora-alpha": 4.0}
    assert "another lora-alpha" in str(federation.fails(monkeypatch, "HUB-08", run_id=8))
    federation.run_config["lora-alpha"] = 0.0
    federation.go(monkeypatch, run_id=9)


def test_an_adapter_of_another_pattern_does_not_fit_a_run():
    adapter = tiny.adapter(1, tiny.config(rank_pattern="attn2=3"))
    with pytest.raises(AdapterError, match="ADAPTER-01"):
        model.check_adapter(adapter, tiny.fresh())


def test_the_hubs_pictures_are_of_the_runs_strength():
    config = tiny.config(lora_alpha=4.0)
    adapter = tiny.adapter(3, config)
    twice = {key: value * 2 if ".lora_B." in key else value for key, value in adapter.items()}
    one = sample.render(sample.pipeline(tiny.base(), config), adapter, config.prompts[:1], config)
    other = sample.render(sample.pipeline(tiny.base(), tiny.CONFIG), twice, config.prompts[:1], config)
    np.testing.assert_array_equal(np.asarray(one[0]), np.asarray(other[0]))
