"""A run's configuration: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
from flwr.common.config import parse_config_args

from app.config import LORA_TARGETS, RunConfig, table
from app.errors import ConfigError
from app.families import FAMILIES


def refused(code: str, **values) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        RunConfig.read({name.replace("_", "-"): value for name, value in values.items()})
    assert caught.value.code == code
    return caught.value


def test_an_empty_config_is_the_defaults():
    config = RunConfig.read({})
    assert (config.base_model, config.resolution, config.rounds, config.lora_rank) == ("mini", 64, 32, 16)


def test_given_values_replace_defaults_under_flowers_names():
    config = RunConfig.read({"local-steps": 7, "lora-targets": "attention"})
    assert (config.local_steps, config.lora_targets, config.batch_size) == (7, "attention", 8)


def test_a_config_cannot_be_changed_after_it_was_read():
    with pytest.raises(FrozenInstanceError):
        RunConfig.read({}).rounds = 5


def test_an_unknown_key_is_refused_with_the_nearest_one():
    error = refused("CONFIG-01", local_step=5)
    assert error.fix == "did you mean local-steps?"
    assert "local-step" in str(error)


def test_an_unknown_key_like_no_other_points_to_the_table():
    assert "docs/run-config.md" in refused("CONFIG-01", zzz=1).fix


def test_a_field_name_is_not_a_key():
    with pytest.raises(ConfigError, match="CONFIG-01"):
        RunConfig.read({"local_steps": 5})


def test_no_key_names_a_path_or_a_device():
    for name in ("data-path", "models-path", "cache-path", "device", "output"):
        refused("CONFIG-01", **{name: "/etc"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rounds", "4"),
        ("rounds", 4.0),
        ("rounds", True),
        ("learning-rate", "0.1"),
        ("learning-rate", True),
        ("base-model", 1),
        ("sample-prompts", False),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    assert repr(value) in refused("CONFIG-02", **{name: value}).found


@pytest.mark.parametrize("value", ["yes", "true", 1, 0, 1.0, None])
def test_a_switch_is_true_or_false_and_nothing_else(value):
    error = refused("CONFIG-02", gradient_checkpointing=value)
    assert error.found == f"gradient-checkpointing = {value!r}" and error.fix.startswith("give true or false, ")


@pytest.mark.parametrize(("word", "expected"), [("true", True), ("false", False)])
def test_a_switch_reads_as_flwr_writes_it(word, expected):
    given = parse_config_args([f"gradient-checkpointing={word} rounds=3"])
    assert RunConfig.read(given).gradient_checkpointing is expected
    assert RunConfig.read({}).gradient_checkpointing is False


def test_a_whole_number_is_taken_where_a_fraction_is_meant():
    learning_rate = RunConfig.read({"learning-rate": 1}).learning_rate
    assert learning_rate == 1.0 and type(learning_rate) is float


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["learning-rate", "min-snr-gamma", "sample-guidance"])
def test_a_number_that_is_not_finite_is_refused(name, value):
    assert "finite" in refused("CONFIG-02", **{name: value}).fix


@pytest.mark.parametrize(
    ("name", "below", "least", "most", "above"),
    [
        ("rounds", 0, 1, 10_000, 10_001),
        ("lora-rank", 0, 1, 512, 513),
        ("caption-dropout", -0.01, 0.0, 1.0, 1.01),
        ("validation-fraction", 0.0, 0.01, 0.5, 0.51),
        ("seed", -1, 0, 2**31 - 1, 2**31),
        ("resolution", 8, 16, 2048, 2056),
    ],
)
def test_a_range_holds_both_its_ends_and_nothing_beyond(name, below, least, most, above):
    for value in (least, most):
        assert getattr(RunConfig.read({name: value}), name.replace("-", "_")) == value
    for value in (below, above):
        assert "a number from" in refused("CONFIG-02", **{name: value}).fix


def test_a_choice_that_is_not_offered_is_refused_with_the_choices():
    assert "attention, attention+resnet" in refused("CONFIG-02", lora_targets="all").fix
    assert "auto, fp32, bf16" in refused("CONFIG-02", precision="fp16").fix


@pytest.mark.parametrize("value", [63, 65, 100])
def test_a_resolution_that_is_no_multiple_of_8_is_refused(value):
    assert "a multiple of 8" in refused("CONFIG-02", resolution=value).fix


def test_prompts_are_split_at_bars_and_trimmed():
    assert RunConfig.read({"sample-prompts": " a rose |a lily||"}).prompts == ("a rose", "a lily")
    assert RunConfig.read({"sample-prompts": ""}).prompts == ()


def test_the_wider_choice_of_layers_holds_the_narrower():
    assert {choice for family in FAMILIES.values() for choice in family.targets} == set(LORA_TARGETS)
    for family in FAMILIES.values():
        few, *more = (set(layers) for layers in family.targets.values())
        assert all(few < layers for layers in more)


def test_the_table_has_a_row_for_every_key_with_default_unit_range_and_meaning():
    lines = table().splitlines()
    assert len(lines) == 2 + len(RunConfig.__dataclass_fields__)
    assert "| `round-timeout` | `3600` | seconds | 10 to 604800 | longest wait for a round's replies |" in lines
    assert any(
        line.startswith("| `gradient-checkpointing` | `false` |  | true, false | compute activations again")
        for line in lines
    )
    assert all(line.count("|") == 6 for line in lines)
