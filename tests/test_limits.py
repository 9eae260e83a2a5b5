"""A site's own limits against a run's config."""

from __future__ import annotations

import pytest

from app.config import RunConfig
from app.errors import ConfigError, SiteError
from app.limits import MODELS, NUMBERS, check

RUN = RunConfig()  # base-model mini, local-steps 60, learning-rate 0.003, lora-rank 16


@pytest.mark.parametrize("limits", ["", "  ", "max-local-steps=60", "max-learning-rate=3e-3 max-local-steps=60.5", "base-models=sd,mini"])
def test_a_run_within_the_limits_is_taken(limits):
    check(RUN, limits)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ("max-local-steps=59", "local-steps"),
        ("max-learning-rate=0.001", "learning-rate"),
        ("max-rounds=100 base-models=mini max-lora-rank=8", "lora-rank"),
        ("base-models=stable-diffusion-v1-5,mini-2", "base-model"),
        ("max-local-steps=nan", "local-steps"),
    ],
)
def test_a_run_that_asks_for_more_is_refused_by_the_keys_name_and_the_limit_stays_at_the_site(limits, name):
    with pytest.raises(SiteError) as refused:
        check(RUN, limits)
    assert str(refused.value) == f"TRUST-03  The run's '{name}' is not within what this site allows."
    assert any(limit in refused.value.report() for limit in limits.split())


@pytest.mark.parametrize(
    "limits",
    ["max-local-step=500", "local-steps=500", "max-base-model=1", "base-model=mini", "max-local-steps", "max-local-steps=", "max-local-steps:500",
     "max-local-steps = 500", "max-local-steps=many", "base-models=", "$SITE_LIMITS", "base-models=mini,max-rounds=100 max-seed"],
)  # fmt: skip
def test_a_limit_with_a_slip_stops_every_run_rather_than_limiting_nothing(limits):
    with pytest.raises(SiteError, match="TRUST-04"):
        check(RUN, limits)


def test_the_limit_that_was_meant_is_named():
    with pytest.raises(SiteError) as refused:
        check(RUN, "max-local-step=500")
    assert "did you mean max-local-steps?" in refused.value.report()


def test_every_numeric_key_of_a_run_can_be_limited():
    assert set(NUMBERS) == {f"max-{name.replace('_', '-')}" for name, value in vars(RUN).items() if type(value) in (int, float)}


def test_a_switch_has_no_most():
    """bool is a kind of int in Python; a site that wants gradient-checkpointing sets SITE_CHECKPOINTING."""
    assert "max-gradient-checkpointing" not in NUMBERS
    with pytest.raises(SiteError, match="TRUST-04"):
        check(RUN, "max-gradient-checkpointing=0")


@pytest.mark.parametrize("key", ["data-path", "models-path", "cache-path", "site-name", "limits", MODELS, *NUMBERS])
def test_a_runs_config_cannot_name_a_path_or_a_sites_limit(key):
    with pytest.raises(ConfigError, match="CONFIG-01"):
        RunConfig.read({key: "x"})
