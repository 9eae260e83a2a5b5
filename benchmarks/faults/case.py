"""A case, one repeat of it, and the verdict.

Survived means: the run completed, or it ended in a declared state with its last good adapter in place and a second run
went on from there; the checker (benchmarks/check.py) finds nothing in either; and where every site took part in every
round, the result is that of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import model
from app.adapter import store
from app.hub import volume
from benchmarks import check
from benchmarks.faults.bench import RUN, Bench
from benchmarks.faults.hub import LIMIT, Hub, Late
from benchmarks.faults.outcome import Outcome

AT = 2  # the round in the middle of which the fault comes
World = Callable[[Path], AbstractContextManager[Hub]]  # a folder -> the deployment in which a case happens


@dataclass(frozen=True)
class Case:
    """A fault in the middle of round 2. `fault` may wait; what must be undone it undoes itself, or does in what it
    returns.
    """

    group: str
    name: str
    fault: Callable[[Any, str], Callable[[], object] | None] = lambda bench, run: None
    world: World = Bench
    config: Mapping[str, object] = field(default_factory=dict)
    same: bool = True  # the result must be that of an undisturbed run
    limit: float = LIMIT  # seconds in which the run must end
    most: int = 5  # repeats in the full set: fewer where one takes minutes
    needs: Callable[[], str] = lambda: ""  # why it cannot be tried here
    play: Callable[[Case, int], list[Outcome]] | None = None  # a case that needs no deployment plays itself


def play(case: Case, bench: Hub, reference: str) -> Outcome:
    """One repeat. reference: hash of an undisturbed run's adapter, '' where there is none to compare with."""
    try:
        return _play(case, bench, reference)
    except Late as late:
        return Outcome(case.name, False, problems=[str(late)])


def _play(case: Case, bench: Hub, reference: str) -> Outcome:
    before = check.adapters(bench.adapters)
    bench.all_online()
    start, config = time.monotonic(), RUN | case.config
    run = bench.start_run(config)
    bench.mid_round(run, AT)
    fault, done = time.time(), AT - 1
    mend = case.fault(bench, run) or (lambda: None)
    try:
        state = bench.wait_for_end(run)
    finally:
        mend()
    problems = judge(bench, run, state, before, time.monotonic() - start, case.limit)
    how, whole = "", run
    if state != "finished:completed":
        how, done = "resumed", max(volume.written_rounds(bench.adapters / run), default=0)
        bench.all_online()
        resume = {"resume": run} if done else {}
        whole = bench.start_run(config | resume)
        again = bench.wait_for_end(whole)
        problems += judge(bench, whole, again, check.adapters(bench.adapters), 0, case.limit)
        problems += [f"the second run ended {again}: {bench.said(whole).get('error')}"] * (
            again != "finished:completed"
        )
    if not problems:
        problems += differs(bench, whole, reference, case.same)
    return Outcome(case.name, not problems, recovered(bench, whole, done, fault), lost(problems), problems, how)


def judge(bench: Hub, run: str, state: str, before: Mapping[str, str], seconds: float, limit: float) -> list[str]:
    """The checker's sentences; a run that left no history has only one."""
    evidence = bench.evidence(run, state=state, seconds=seconds, limit=limit, before=before)
    if not (evidence.run / "history.json").is_file():
        return [
            *check.half_written(evidence.volume),
            *check.lost(evidence),
            f"the run ended {state} and left no history",
        ]
    return check.check(evidence)


def differs(bench: Hub, run: str, reference: str, same: bool) -> list[str]:
    """Whether the result is another one than an undisturbed run's, where it must not be."""
    final = bench.adapters / run / "final"
    if not same or not reference or model.adapter_hash(store.read_adapter(final)) == reference:
        return []
    return ["the adapter is not that of an undisturbed run"]


def recovered(bench: Hub, run: str, done: int, fault: float) -> float | None:
    """Seconds from the fault to the first whole round after it."""
    folder = bench.adapters / run / f"round-{done + 1:04d}"
    return round(folder.stat().st_mtime - fault, 1) if folder.is_dir() else None


def lost(problems: list[str]) -> int:
    return sum(problem.startswith("lost:") for problem in problems)
