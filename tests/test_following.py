"""Following a run: what is shown of its log, and what a hub that is away does to it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from app.errors import BouquetError
from bouquet.hub import control, following, runs

AWAY = control.Unanswered("HOST-08", did="does not answer", found="refused", fix="start it")
OVER = ("finished:completed", "")


class Hub:
    """states: what it says of the run, one after the other. logs: what of its log, with an error where it is cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[tuple[str, str] | BouquetError] = [OVER]
        self.logs: list[list[str | BouquetError]] = []
        self.asked: list[float] = []
        self.shown: list[str] = []
        monkeypatch.setattr(runs, "status", self.status)
        monkeypatch.setattr(control, "log", self.log)
        monkeypatch.setattr(following, "SOON", 0.0)
        monkeypatch.setattr(following, "AGAIN", 0.0)

    def status(self, run: str) -> tuple[str, str]:
        said = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(said, BouquetError):
            raise said
        return said

    def log(self, run: str, after: float) -> Iterator[tuple[str, float]]:
        self.asked.append(after)
        for number, said in enumerate(self.logs.pop(0) if self.logs else [], 1):
            if isinstance(said, BouquetError):
                raise said
            yield said, after + number

    def followed(self) -> tuple[str, str]:
        return following.follow("7", self.shown.append)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def test_lines_of_the_apps_own_are_shown_whole_and_harmless_and_the_last_one_without_its_end(hub: Hub) -> None:
    hub.logs = [
        ["INFO: flower\nbouquet: \x1b[2Jround", " 1/2\nCONFIG-01  no\n  found  x\n other\nbouquet: the", " end"]
    ]
    assert hub.followed() == OVER
    assert hub.shown == ["bouquet: \ufffd[2Jround 1/2", "CONFIG-01  no", "  found  x", "bouquet: the end"]


def test_a_line_without_an_end_takes_bounded_room_and_time() -> None:
    begun = "bouquet: "
    for _ in range(200):
        lines, begun = following.ours(begun + "x" * 100_000)
        assert not lines and len(begun) == 10_000
    assert following.ours(begun + "\nbouquet: next\n") == ([begun, "bouquet: next"], "")


def test_a_hub_that_is_away_for_a_while_is_told_of_once_and_the_run_is_followed_to_its_end(hub: Hub) -> None:
    hub.states = [("running", ""), AWAY, AWAY, ("running", ""), OVER]
    hub.logs = [["bouquet: 1\n", AWAY], ["bouquet: 2\n"], ["bouquet: 3\n"]]
    assert hub.followed() == OVER
    told = "bouquet: the hub does not answer now (refused); asking for 5 minutes"
    assert hub.shown == ["bouquet: 1", told, "bouquet: 2", "bouquet: 3"] and hub.asked == [0.0, 1.0, 2.0]


def test_a_hub_that_stays_away_ends_it_with_the_command_that_looks_for_the_run(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "PATIENT", -1.0)
    hub.states = [AWAY]
    with pytest.raises(BouquetError, match="HOST-08  The hub does not answer") as caught:
        hub.followed()
    assert "bouquet hub status 7" in caught.value.fix and not isinstance(caught.value, control.Unanswered)


def test_a_hub_that_knows_the_run_no_more_ends_it_at_once(hub: Hub) -> None:
    hub.states = [("running", ""), BouquetError("HOST-08", did="knows no such run", found="7", fix="")]
    with pytest.raises(BouquetError, match="knows no such run"):
        hub.followed()
    assert hub.shown == []


def test_the_last_words_of_a_run_are_asked_for_again_where_they_were_cut(hub: Hub) -> None:
    hub.logs = [["bouquet: why\n", AWAY], ["CONFIG-01  why it failed\n"]]
    assert hub.followed() == OVER and hub.shown == ["bouquet: why", "CONFIG-01  why it failed"]


def test_that_a_log_cannot_be_had_is_said_once_and_the_runs_end_comes_without_it(hub: Hub) -> None:
    hub.logs = [[AWAY]] * 99
    assert hub.followed() == OVER
    assert hub.shown == ["bouquet: the run's log cannot be had now: refused"] and len(hub.asked) == following.LAST


def test_a_finished_runs_log_that_always_breaks_is_left(hub: Hub) -> None:
    hub.logs = [[f"bouquet: {number}\n", AWAY] for number in range(99)]
    assert hub.followed() == OVER
    assert [line for line in hub.shown if line[9:].isdigit()] == [
        f"bouquet: {number}" for number in range(following.LAST)
    ]


def test_a_moment_that_goes_back_is_not_asked_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.states, moments = [("running", ""), OVER], iter([9.0, 3.0])
    monkeypatch.setattr(control, "log", lambda run, after: hub.asked.append(after) or [("", next(moments))])
    hub.followed()
    assert hub.asked == [0.0, 9.0]


def test_a_port_where_nobody_listens_is_a_hub_that_is_away(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        f'[superlink.{runs.CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    for ask in (lambda: runs.status("7"), lambda: [*control.log("7", 0.0)]):
        with pytest.raises(control.Unanswered, match="HOST-08"):
            ask()
