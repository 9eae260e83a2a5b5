"""The learning rate over a run: by hand at the steps where it matters, and in the optimiser that takes them."""

from __future__ import annotations

import math

import pytest

from app.config import RunConfig
from app.errors import ConfigError
from app.site import diffusion, rate, train
from tests.kit import tiny
from tests.test_train import encoded

RUN = {"rounds": 10, "local_steps": 4}  # 40 steps, of which the last quarter is 30 to 39


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1.0, 39: 1.0}),
        ("tail", {0: 1.0, 29: 1.0, 30: 1.0, 35: 0.5, 39: 0.1}),
        ("linear", {0: 1.0, 10: 0.75, 39: 0.025}),
        ("cosine", {0: 1.0, 20: 0.5, 10: (1 + math.cos(math.pi / 4)) / 2}),
    ],
)
def test_the_rate_is_where_the_run_is(schedule, expected):
    factor = rate.factors(tiny.config(learning_rate_schedule=schedule, **RUN))
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "tail", "linear", "cosine"])
def test_it_rises_from_0_in_equal_steps_once_a_run(schedule):
    factor = rate.factors(tiny.config(learning_rate_schedule=schedule, warmup_steps=4, **RUN))
    assert [factor(step) for step in range(5)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


def rates(monkeypatch, number: int, **changes) -> list[float]:
    """What the optimiser had at each step of round `number`."""
    seen = tiny.rates(monkeypatch)
    config = tiny.config(learning_rate=0.1, **RUN | changes)
    net, objective = tiny.unet(config), diffusion.Objective.of(tiny.base())
    train.fit(net, objective, encoded(), config, train.accelerator(config), 1, number)
    return seen


def test_each_step_of_a_round_has_its_own_rate_and_a_late_round_begins_where_the_run_is(monkeypatch):
    assert rates(monkeypatch, 9, learning_rate_schedule="tail") == pytest.approx([0.08, 0.07, 0.06, 0.05])


def test_passes_that_are_gathered_into_a_step_share_its_rate(monkeypatch):
    found = rates(monkeypatch, 10, learning_rate_schedule="tail", gradient_accumulation=2, batch_size=2)
    assert found == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_a_constant_rate_is_the_one_that_was_asked_for_to_the_bit(monkeypatch):
    assert rates(monkeypatch, 3, learning_rate_schedule="constant") == [0.1] * 4


def test_unless_a_run_says_otherwise_the_rate_falls_to_0_over_its_last_quarter(monkeypatch):
    assert RunConfig().learning_rate_schedule == "tail"
    assert [list(rates(monkeypatch, number)) for number in (7, 8, 10)] == [
        [0.1] * 4,
        pytest.approx([0.1, 0.1, 0.1, 0.09]),  # the 31st and 32nd of 40 steps: 10 and 9 tenths
        pytest.approx([0.04, 0.03, 0.02, 0.01]),
    ]


def test_a_run_that_goes_on_with_more_rounds_is_where_the_longer_run_is():
    """After 8 of 10 rounds it goes on to 16: 64 steps, of which the last 16 fall."""
    factor = rate.factors(tiny.config(**RUN | {"rounds": 16}))
    assert [factor(step) for step in (32, 47, 48, 56, 63)] == [1.0, 1.0, 1.0, 0.5, 1 / 16]


@pytest.mark.parametrize("schedule", ["tail", "linear", "cosine"])
def test_a_step_beyond_the_run_takes_nothing_back(schedule):
    assert rate.factors(tiny.config(learning_rate_schedule=schedule, **RUN))(41) >= 0.0


def test_a_schedule_that_there_is_none_of_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError) as caught:
        RunConfig.read({"learning-rate-schedule": "polynomial"})
    assert caught.value.code == "CONFIG-02" and "constant, linear, cosine, tail" in caught.value.fix
