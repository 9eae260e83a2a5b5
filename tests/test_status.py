"""`bouquet hub status`: what it says of a run that works, has ended or was killed, and the exit code by which a script
knows.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import sh
from flwr.common.config import parse_config_args

from app.errors import BouquetError
from app.hub.history import History, Status
from bouquet import ROOT
from bouquet.hub import adapters, control, roster
from bouquet.hub import status as status_
from bouquet.report.reading import read

NOW = datetime(2026, 1, 2, 12, 0, 30, tzinfo=UTC).timestamp()


def a_run(folder: Path, state: str = "running", rounds: int = 1, doing: str = "working", **status) -> Path:
    """A run of three rounds at two sites, of which `rounds` are done."""
    folder.mkdir(parents=True)
    late = [{"site": "orchard", "reason": "HUB-03  No reply within 60 s."}]
    done = {"seconds": 20, "sites": {"garden": {}, "meadow": {}}, "refused": late, "train_loss": 0.1}
    done |= {"started_from": "0" * 64, "adapter": "1" * 64}
    history = {"run": folder.name, "state": state, "config": {"rounds": 3}, "validation": []}
    history["rounds"] = [{"round": n} | done for n in range(1, rounds + 1)]
    if state == "failed":
        history["error"] = "HUB-02  Too few valid replies in round 2."
    (folder / "history.json").write_text(json.dumps(history))
    (folder / "status.json").write_text(json.dumps({"run": folder.name, "state": doing} | status))
    return folder


@pytest.fixture
def hub(monkeypatch):
    """What Flower says of the run, and which sites the hub has not heard of."""
    word: dict[str, Any] = {"state": ("running", ""), "offline": {}}
    monkeypatch.setattr(
        control, "run", lambda run="": control.Told(run, word["state"][0], word["state"][1], "2026-01-02T12:00:00Z")
    )
    monkeypatch.setattr(status_, "seen", lambda: word["offline"])
    return word


def facts(folder: Path, hub: dict) -> dict:
    run = read(folder)
    return status_.tell(run, *status_.end_of(run), hub["offline"])


def test_a_round_that_waits_says_who_replied_who_is_missing_since_when_and_until_when(tmp_path, hub):
    hub["offline"] = {"orchard": "2026-01-02T11:59:00+00:00"}
    more = {"since": NOW - 30, "deadline": NOW + 45, "took": {"meadow": 48.3}}
    folder = a_run(
        tmp_path / "7", doing="waiting", round=2, attempt=1, replied=["garden"], missing=["meadow", "orchard"], **more
    )
    assert status_.words(facts(folder, hub), NOW).splitlines() == [
        "run       7  running, waiting",
        "rounds    1 of 3 done, now 2",
        "waiting   since 12:00:00 UTC, until 12:01:15 UTC (45 s more), try 2",
        "replied   garden",
        "missing   meadow  at work for 30 s, the last time 48 s",
        "missing   orchard  offline since 11:59:00 UTC",
        "refused   orchard  round 1: HUB-03  No reply within 60 s.",
        "adapter   7/round-0001",
        "averaging not known",
    ]


def test_a_site_that_never_replied_before_and_one_of_an_older_hub_are_at_work_all_the_same(tmp_path, hub):
    for number, took in enumerate(({}, {"garden": 48.3}), start=7):
        folder = a_run(
            tmp_path / str(number),
            doing="waiting",
            round=2,
            missing=["meadow"],
            since=NOW - 80,
            deadline=NOW,
            took=took,
        )
        assert "missing   meadow  at work for 80 s\n" in status_.words(facts(folder, hub), NOW)


def test_a_run_that_failed_says_why_where_its_last_good_adapter_is_and_how_to_go_on(tmp_path, hub):
    said = status_.words(facts(a_run(tmp_path / "7", "failed"), hub), NOW)
    assert "why       HUB-02  Too few valid replies in round 2." in said and "adapter   7/round-0001" in said
    assert (
        said.splitlines()[-1]
        == "next      mend it, then: flwr run . remote-deployment --run-config 'resume=\"7\" rounds=3'"
    )


def test_the_way_to_go_on_has_the_runs_own_keys_as_a_shell_and_toml_take_them(tmp_path):
    """Of those that are as usual none; quotes of either kind come through."""
    own = {"rounds": 64, "learning_rate": 0.003, "flip": True, "trigger_word": 'l\'œillet "rose"', "resume": "6"}
    given = status_.again(History("7", "failed", own | {"of-another-version": 1}))
    [words] = shlex.split(given)
    assert parse_config_args([words]) == {
        "resume": "7",
        "rounds": 64,
        "flip": True,
        "trigger-word": own["trigger_word"],
    }


def test_a_run_whose_serverapp_was_killed_has_failed_although_its_history_says_running(tmp_path, hub):
    hub["state"] = ("finished:failed", "No heartbeat received from the run.")
    found = facts(a_run(tmp_path / "7", state="running"), hub)
    assert found["state"] == "failed" and "No heartbeat" in found["why"] and found["missing"] == {}


def test_without_an_answer_of_the_hub_a_run_counts_as_running_and_that_is_said(tmp_path, hub, monkeypatch):
    def silent(run: str):
        raise BouquetError("HOST-08", did="does not answer", found="", fix="")

    monkeypatch.setattr(control, "run", silent)
    found = facts(a_run(tmp_path / "7"), hub)
    assert found["state"] == "running"
    assert found["why"] == "the hub does not answer now: HOST-08  The hub does not answer."


def test_a_run_that_the_hub_has_forgotten_does_not_go_on(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(control, "run", lambda run: None)
    found = facts(a_run(tmp_path / "7"), hub)
    assert found["state"] == "failed" and "its state was made anew" in found["why"]


# --- before a run has written anything -------------------------------------------------------------------------------


@pytest.fixture
def volume(tmp_path, monkeypatch) -> Path:
    """An output volume with one finished run, 7."""
    monkeypatch.setenv("BOUQUET_ADAPTERS", str(tmp_path))
    a_run(tmp_path / "7", "finished", rounds=3)
    return tmp_path


def shown(monkeypatch, capsys, told: control.Told | None, number: str = "") -> tuple[int, list[str]]:
    """`bouquet hub status` while the hub says that."""
    monkeypatch.setattr(control, "run", lambda number="": told)
    monkeypatch.setattr(status_, "seen", dict)
    code = status_.show(number)
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("state", "what"), [("pending", "SuperExec to take"), ("starting", "ServerApp to start"), ("running", "first word")]
)
@pytest.mark.parametrize("number", ["", "8"])
def test_a_run_that_has_written_nothing_says_what_it_waits_for(volume, monkeypatch, capsys, state, what, number):
    code, lines = shown(monkeypatch, capsys, control.Told("8", state, "", "2026-01-02T13:00:05+01:00"), number)
    assert code == 3 and lines[0] == f"run       8  running, {state}"
    assert lines[1].startswith("waiting   since 12:00:05 UTC, for ") and what in lines[1]
    assert lines[2:] == ["adapter   none yet"]


def test_a_run_that_ended_before_it_wrote_anything_says_why(volume, monkeypatch, capsys):
    told = control.Told("8", "finished:failed", "MODEL-01  There is no such base model.", "2026-01-02T12:00:00+00:00")
    code, lines = shown(monkeypatch, capsys, told)
    assert code == 1 and lines[0] == "run       8  failed" and "MODEL-01  There is no such base model." in lines[1]


@pytest.mark.parametrize("told", [None, control.Told("9", "finished:completed", "", "2026-01-02T12:00:00+00:00")])
def test_without_a_newer_run_the_newest_on_the_volume_is_shown(volume, monkeypatch, capsys, told):
    """A hub that is new, or a newest run whose folder somebody has taken away."""
    code, lines = shown(monkeypatch, capsys, told)
    assert code == 0 and lines[0] == "run       7  finished"


def test_a_torn_history_is_named_and_hides_no_other_run(volume, monkeypatch):
    (volume / "8").mkdir()
    (volume / "8" / "history.json").write_text('{"run": "8", "state": "runn')
    assert [told.run for told in adapters.histories()] == ["7"]
    with pytest.raises(BouquetError, match="REPORT-02"):
        status_.find("8", volume)


def test_a_torn_status_is_as_none(volume, monkeypatch):
    (volume / "7" / "status.json").write_text('{"run": "7", "st')
    assert status_.find("7", volume).status == Status()


def test_a_sites_name_and_reason_cannot_move_the_cursor(tmp_path, hub):
    folder = a_run(
        tmp_path / "7", doing="waiting", round=2, attempt=0, since=NOW, deadline=NOW, missing=["\x1b[2Jmeadow"]
    )
    said = status_.words(facts(folder, hub), NOW)
    assert "\x1b" not in said and "missing   \ufffd[2Jmeadow" in said


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1)])
def test_the_exit_code_says_how_the_run_ended(tmp_path, state, code):
    a_run(tmp_path / "7", state, rounds=3)
    for follow in ("", " --follow"):
        done = sh(
            f"scripts/bouquet hub status{follow} --json",
            ROOT,
            check=False,
            BOUQUET_ADAPTERS=str(tmp_path),
            FLWR_HOME=str(tmp_path / "flwr"),
        )
        shown = json.loads(done.stdout[done.stdout.index("{") :])
        assert (done.returncode, shown["run"], shown["state"], shown["adapter"]) == (code, "7", state, "7/round-0003")


def test_a_running_run_ends_with_3_and_no_run_with_1(tmp_path):
    settings = {"BOUQUET_ADAPTERS": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr")}
    nothing = sh("scripts/bouquet hub status", ROOT, check=False, **settings)
    assert nothing.returncode == 1 and "REPORT-01" in nothing.stdout and str(tmp_path) not in nothing.stdout
    a_run(tmp_path / "7")
    assert sh("scripts/bouquet hub status", ROOT, check=False, **settings).returncode == 3
    assert sh("scripts/bouquet hub status ../7", ROOT, check=False, **settings).returncode == 2


def test_without_an_id_the_newest_run_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("BOUQUET_ADAPTERS", str(tmp_path))
    for age, name in enumerate(("9", "8", "7")):
        os.utime(a_run(tmp_path / name) / "history.json", (time.time() - age, time.time() - age))
    (tmp_path / "latest").symlink_to("7")
    assert adapters.run("", tmp_path).name == "9" and adapters.run("8", tmp_path).name == "8"


def test_a_sites_last_sign_of_life_is_the_hubs_own(monkeypatch):
    sites = [
        roster.Site("garden", "online", "t1", None, 1),
        roster.Site("meadow", "offline", "t2", None, 2),
        roster.Site("new", "admitted", None, None, 3),
    ]
    monkeypatch.setattr(roster, "registered", lambda: sites)
    assert status_.seen() == {"meadow": "t2", "new": "never"}
