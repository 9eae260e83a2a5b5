"""A run's progress in a terminal: the line, following a run, and the demo's view."""

from __future__ import annotations

import io

from bouquet import demo
from bouquet.report import progress
from tests.kit.runs import a_run, history, written


def test_a_sparkline_goes_from_the_lowest_bar_to_the_highest():
    assert (
        progress.sparkline([8, 1, 4.5]) == "█▁▅" and progress.sparkline([2, 2]) == "▁▁" and progress.sparkline([]) == ""
    )


def test_the_progress_line_says_round_losses_sites_and_time_left():
    told = history(2, 6, "running")
    assert progress.line(a_run(told)) == "round 2/6  validation █▃▁ 0.2000  sites 2  20 s a round  ETA 80 s"


def test_a_sites_name_cannot_move_the_cursor():
    shown = progress.line(a_run(history(1, 3, "running"), status={"missing": ["\x1b[2Jrose"]}))
    assert "waiting for �[2Jrose" in shown and "\x1b" not in shown


def test_following_prints_a_plain_line_a_round_and_ends_with_the_run(tmp_path, monkeypatch):
    folder, out, seen = written(tmp_path / "7", history(1, 3, "running")), io.StringIO(), []
    later = iter([history(1, 3, "running"), history(2, 3, "running"), history(3, 3, "finished")])
    monkeypatch.setattr(progress.time, "sleep", lambda seconds: written(folder, next(later)))
    assert progress.follow(folder, out, lambda run: seen.append(len(run.rounds))).state == "finished"
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["round 1/3", "round 2/3", "round 3/3"]
    assert out.getvalue().rstrip().endswith("finished") and seen == [1, 2, 3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


DEMO = [
    "bouquet: round 1/2  train 0.0977  validation 0.2056  sites 2  images 365  23 s  ETA 23 s",
    "bouquet: refused  site-2: HUB-03  No reply within 60 s.",
    "bouquet: round 2/2  train 0.0811  validation 0.1110  sites 2  images 365  23 s  ETA 0 s",
    "bouquet: drawing samples",
]


def test_in_a_terminal_the_demos_rounds_share_a_line_with_a_bar_for_each_loss():
    view = demo.View(out := Terminal())
    for line in DEMO:
        view(line)
    assert out.getvalue().split("\n") == [
        progress.CLEAR + "round 1/2  validation ▁ 0.2056  sites 2  images 365  23 s  ETA 23 s",
        "refused  site-2: HUB-03  No reply within 60 s.",
        progress.CLEAR + "round 2/2  validation █▁ 0.1110  sites 2  images 365  23 s  ETA 0 s",
        "drawing samples",
        "",
    ]


def test_elsewhere_the_demos_lines_are_the_servers():
    view = demo.View(out := io.StringIO())
    for line in DEMO:
        view(line)
    assert out.getvalue().splitlines() == [line.removeprefix("bouquet: ") for line in DEMO]
