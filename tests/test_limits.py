"""A site's own limits, floors and budget against a run's config and against what the site has answered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.config import RunConfig
from app.errors import ConfigError, SiteError
from app.site.limits import MODELS, NUMBERS, OWN, PRIVATE, WEEK, Limits, check_turn
from bouquet import ROOT

RUN = RunConfig(rounds=8, local_steps=60, batch_size=16)  # base-model mini, learning-rate 0.003, lora-rank 16
RULES = Limits().private()


def refusal(code: str, limits: Limits, check: str, *args, **named) -> SiteError:
    with pytest.raises(SiteError) as refused:
        getattr(limits, check)(*args, **named)
    assert refused.value.code == code
    return refused.value


# --- what the site wrote
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    ["", "  ", "max-local-steps=60", "max-learning-rate=3e-3 max-local-steps=60.5", "base-models=sd,mini",
     "min-batch-size=16 min-local-steps=1", "min-batch-size=8 max-batch-size=16", "min-held-out=20 max-runs-a-week=1"],
)  # fmt: skip
def test_a_run_within_the_limits_is_taken(limits):
    Limits.read(limits).check(RUN)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ("max-local-steps=59", "local-steps"),
        ("max-learning-rate=0.001", "learning-rate"),
        ("max-rounds=100 base-models=mini max-lora-rank=8", "lora-rank"),
        ("base-models=stable-diffusion-v1-5,mini-2", "base-model"),
        ("max-local-steps=nan", "local-steps"),
        ("min-batch-size=17", "batch-size"),
        ("min-caption-dropout=nan", "caption-dropout"),
        ("max-local-steps=100 max-local-steps=59", "local-steps"),
        ("min-batch-size=17 min-batch-size=1", "batch-size"),
    ],
)
def test_a_run_outside_is_refused_by_the_keys_name_and_the_limit_stays_at_the_site(limits, name):
    refused = refusal("TRUST-03", Limits.read(limits), "check", RUN)
    assert str(refused) == f"TRUST-03  The run's '{name}' is not within what this site allows."
    assert any(limit in refused.report() for limit in limits.split())


@pytest.mark.parametrize(
    ("number", "attempt", "training", "taken"),
    [
        (1, 0, True, True), (2, 1, True, True), (3, 0, True, False), (3, 0, False, True), (4, 0, False, False),
        (0, 0, True, False), (9999, 0, True, False), (1, 2, True, False), (1, -1, True, False),
    ],
)  # fmt: skip
def test_a_message_is_of_a_round_and_a_try_that_the_run_has_and_of_one_more_for_the_last_evaluation(
    number, attempt, training, taken
):
    run = RunConfig(rounds=2, round_retries=1)
    if taken:
        return check_turn(run, number, attempt, training=training)
    with pytest.raises(SiteError, match="TRUST-03") as refused:
        check_turn(run, number, attempt, training=training)
    assert refused.value.found == f"round {number}, try {attempt + 1}; the run has 2 rounds of 2 tries"


@pytest.mark.parametrize(
    "limits",
    ["max-local-step=500", "local-steps=500", "max-base-model=1", "base-model=mini", "max-local-steps",
     "max-local-steps=", "max-local-steps:500", "max-local-steps = 500", "max-local-steps=many", "base-models=",
     "base-models=mini,", "$SITE_LIMITS", "base-models=mini,max-rounds=100 max-seed", "min-base-model=1",
     "min-batch=8", "max-held-out=3"],
)  # fmt: skip
def test_a_limit_with_a_slip_stops_every_run_rather_than_limiting_nothing(limits):
    with pytest.raises(SiteError, match="TRUST-04"):
        Limits.read(limits)


@pytest.mark.parametrize(
    ("written", "meant"), [("max-local-step=500", "max-local-steps"), ("min-heldout=4", "min-held-out")]
)
def test_the_limit_that_was_meant_is_named(written, meant):
    with pytest.raises(SiteError) as refused:
        Limits.read(written)
    assert f"did you mean {meant}?" in refused.value.report()


def test_every_numeric_key_of_a_run_has_a_most_and_a_least():
    keys = {name.replace("_", "-") for name, value in vars(RUN).items() if type(value) in (int, float)}
    assert set(NUMBERS) == {f"{end}-{key}" for end in ("max", "min") for key in keys}


def test_a_switch_has_no_most():
    """bool is a kind of int in Python; a site that wants gradient-checkpointing sets SITE_CHECKPOINTING."""
    assert "max-gradient-checkpointing" not in NUMBERS
    with pytest.raises(SiteError, match="TRUST-04"):
        Limits.read("max-gradient-checkpointing=0")


# --- floors
# --------------------------------------------------------------------------------------------------------------


def test_without_private_photos_nothing_but_what_the_site_wrote_holds():
    one = replace(RUN, batch_size=1, local_steps=1)
    Limits().check_photos(one, trained=1, held_out=1)
    Limits().check_budget(one, "8", [{"run": str(n), "time": 0.0} for n in range(5000)], now=1.0)
    assert all(Limits().floor(name) == 1 for name in OWN if name.startswith("min-"))


def test_a_usual_run_over_private_photos_is_taken():
    RULES.check_photos(RUN, trained=8, held_out=8)
    RULES.check_photos(replace(RUN, batch_size=1, gradient_accumulation=4, local_steps=4), trained=100, held_out=8)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 3}, "batch-size times gradient-accumulation"),
        ({"batch_size": 1, "gradient_accumulation": 3}, "batch-size times gradient-accumulation"),
        ({"local_steps": 3}, "local-steps"),
    ],
)
def test_a_run_about_too_few_private_photos_is_refused(changes, name):
    refused = refusal("TRUST-03", RULES, "check_photos", replace(RUN, **changes), trained=100, held_out=10)
    assert str(refused) == f"TRUST-03  The run's {name!r} is not within what this site allows."


def test_a_round_must_see_as_many_photos_as_the_floor_says():
    """4 steps of 4 images are 16, of 3 are 12."""
    rules = Limits.read("min-photos=16 min-step-images=1").private()
    rules.check_photos(replace(RUN, batch_size=4, local_steps=4), trained=20, held_out=8)
    refused = refusal(
        "TRUST-03", rules, "check_photos", replace(RUN, batch_size=3, local_steps=4), trained=20, held_out=8
    )
    assert "4, which sees 12 photos" in refused.report()


@pytest.mark.parametrize(("trained", "held_out"), [(7, 8), (8, 7), (15, 1)])
def test_a_folder_with_fewer_private_photos_than_the_floors_takes_no_run(trained, held_out):
    assert (
        "SITE_LIMITS='min-photos=4 min-held-out=4'"
        in refusal("SITE-02", RULES, "check_photos", RUN, trained=trained, held_out=held_out).fix
    )


def test_a_site_sets_its_own_floors_higher_or_lower_than_the_usual_ones():
    lower = Limits.read("min-photos=2 min-held-out=1 min-step-images=1 min-local-steps=1").private()
    lower.check_photos(replace(RUN, batch_size=1, local_steps=2), trained=3, held_out=1)
    higher = Limits.read("min-held-out=20").private()
    refusal("SITE-02", higher, "check_photos", RUN, trained=100, held_out=19)


def test_the_sites_page_has_every_floor_and_budget_with_its_value():
    page = (ROOT / "docs" / "site.md").read_text()
    assert [
        f"| `{name}` | {value} | {about} |"
        for name, (value, about) in PRIVATE.items()
        if f"| `{name}` | {value} | {about} |\n" not in page
    ] == []


# --- the budget of a week
# --------------------------------------------------------------------------------------------------


def answered(runs: dict[str, int], ago: float = 60.0) -> list[dict]:
    """A journal: so many messages of each run, a minute ago; the time is that of `now=WEEK`."""
    return [{"run": run, "time": WEEK - ago} for run, count in runs.items() for _ in range(count)]


def test_the_last_run_and_the_last_message_of_a_week_are_taken():
    RULES.check_budget(replace(RUN, rounds=1), "new", answered({str(n): 1 for n in range(49)}), now=WEEK)
    RULES.check_budget(RUN, "old", answered({"old": 1999}), now=WEEK)


@pytest.mark.parametrize(
    ("journal", "run", "limit"),
    [
        ({str(n): 1 for n in range(50)}, "new", "max-runs-a-week=50"),
        ({"old": 2000}, "old", "max-messages-a-week=2000"),
        ({"old": 1993}, "new", "max-messages-a-week=2000"),  # 8 rounds and an evaluation would be 2002
    ],
)
def test_more_than_a_weeks_budget_is_refused_before_a_run_begins_where_it_could_not_end(journal, run, limit):
    refused = refusal("TRUST-10", RULES, "check_budget", replace(RUN, rounds=8), run, answered(journal), now=WEEK)
    assert limit in refused.found and limit not in str(refused)


def test_what_is_older_than_a_week_does_not_count():
    RULES.check_budget(RUN, "new", answered({"old": 2000}, ago=WEEK + 1), now=WEEK)


def test_a_journal_line_without_a_time_or_a_run_spoils_nothing():
    RULES.check_budget(RUN, "new", [{}, {"run": None, "time": WEEK}], now=WEEK)


# --- what is not the run's
# -------------------------------------------------------------------------------------------------


def test_the_models_that_a_site_lends_are_names():
    assert Limits.read(f"{MODELS}=mini,sd").models == ("mini", "sd")


def test_a_run_config_cannot_lift_a_limit():
    with pytest.raises(ConfigError, match="CONFIG-01"):
        RunConfig.read({"limits": "", "max-local-steps": 10**6})
