"""How far long work is: a bar at a terminal, plain lines elsewhere, and nothing of either among a command's results."""

from __future__ import annotations

import io
import re
import sys

import pytest

from bouquet import cli, progress
from bouquet.hub import control, runs

PLAIN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch) -> Terminal:
    """From now on standard output and error are one terminal of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def words(terminal: Terminal) -> str:
    """What it shows, without the colours."""
    return PLAIN.sub("", terminal.getvalue())


def test_at_a_terminal_a_bar_advances_with_every_step_and_goes_when_the_work_is_done(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    with progress.Bar("drawing", 3) as bar:
        for done in (1, 2, 3):
            bar.to(done)
            bar.shown.refresh()
    assert re.findall(r"drawing .*? (\d/3)", words(terminal)) == ["0/3", "1/3", "2/3", "3/3", "3/3"]
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # the last line is wiped


def test_the_steps_are_those_of_the_work_and_counted_when_each_is_done(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    assert list(progress.steps("comparing", "abc")) == list("abc")
    assert "3/3" in words(terminal)


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_none_before():
    now, out = [0.0], io.StringIO()
    with progress.Bar("site-1", 40, out, clock=lambda: now[0]) as bar:
        for done in range(1, 41):
            now[0] += 0.75
            bar.to(done)
    assert out.getvalue() == "site-1  14/40, 10 s\nsite-1  28/40, 21 s\n"  # at 10.5 s and 21 s; 30 s are 9 later


def test_work_of_unknown_length_says_how_much_is_done():
    now, out = [0.0], io.StringIO()
    with progress.Bar("site-1", None, out, clock=lambda: now[0]) as bar:
        now[0] = 12.4
        bar.to(7)
    assert out.getvalue() == "site-1  7, 12 s\n"


def test_where_results_go_into_a_pipe_there_is_no_bar_between_them(monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert list(progress.steps("comparing", "abc")) == list("abc")
    assert terminal.getvalue() == "" and sys.stdout.getvalue() == ""


def test_a_data_set_that_is_divided_counts_each_sites_photos(tmp_path, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    asked = ["data", "partition", "--sites", "2", "--images-per-site", "3", "--out", str(tmp_path / "sites")]
    assert cli.main(asked) == 0
    assert re.findall(r"(site-\d) \S+ 3/3", words(terminal)) == ["site-1", "site-2"]


@pytest.fixture
def hub(monkeypatch):
    """A hub of which a run's log has two rounds, one in two pieces, of which the second comes when the run is over."""
    said = ["INFO : Start\nbouquet: round 1/2  train 0.2\nbouquet: ro", "und 2/2  train 0.1\n"]
    ends = iter([("running", ""), ("finished:completed", "")])
    monkeypatch.setattr(control, "log", lambda run, after: iter([(said[int(after)], after + 1)]))
    monkeypatch.setattr(runs, "start_run", lambda run_config: "7")
    monkeypatch.setattr(runs, "status", lambda run: next(ends))


def test_a_run_at_a_terminal_has_its_lines_above_a_bar_of_its_rounds(hub, monkeypatch):
    terminal = at_a_terminal(monkeypatch)
    assert cli.main(["run"]) == 0
    shown = words(terminal)
    assert shown.index("bouquet: round 1/2  train 0.2") < shown.index("bouquet: round 2/2  train 0.1")
    assert re.search(r"rounds .*? 2/2", shown) and "Start" not in shown


def test_a_run_without_a_terminal_is_its_lines_alone(hub, capsys):
    assert cli.main(["run"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "run 7 has started; bouquet hub status 7",
        "bouquet: round 1/2  train 0.2",
        "bouquet: round 2/2  train 0.1",
        "run 7  finished:completed",
    ]
    assert said.err == ""
