"""Faults on purpose, and whether anything was lost: `scripts/faults [--only PATTERN …] [--repeats 5] [--json FILE]`

Three sites and a hub, as processes on loopback or as containers; runs of three rounds, one fault in the middle of the
second; then the checker. Prints a line a repeat and the table at the end. Exit code 1 when something did not survive.
docs/faults.md says what each case is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from app import model
from app.adapter import store
from benchmarks import check
from benchmarks.faults import containers, disk, kills, network, outcome, photos, updates
from benchmarks.faults.bench import RUN
from benchmarks.faults.case import Case, play
from benchmarks.faults.hub import Hub
from benchmarks.faults.outcome import Outcome

CASES = [*kills.CASES, *network.CASES, *disk.CASES, *updates.CASES, *photos.CASES, *containers.CASES]
Tell = Callable[[Outcome], None]


def undisturbed(bench: Hub) -> str:
    """Hash of the adapter of a run that nothing happens to, which the checker must find whole."""
    run = bench.start_run(RUN)
    state = bench.wait_for_end(run)
    problems = check.check(bench.evidence(run, state=state))
    assert state == "finished:completed" and not problems, (state, problems, bench.said(run))
    return model.adapter_hash(store.read_adapter(bench.adapters / run / "final"))


def in_deployments(
    cases: list[Case], repeats: int, home: Callable[[], contextlib.AbstractContextManager[Path]], tell: Tell
) -> None:
    """Cases that share a world share its deployment, until one of them does not survive there."""
    for world in dict.fromkeys(case.world for case in cases):
        todo = [case for case in cases if case.world is world for _ in range(min(repeats, case.most))]
        while todo:
            with home() as folder, world(folder) as bench:
                reference = undisturbed(bench)
                while todo:
                    tell(result := play(todo.pop(0), bench, reference))
                    if not result.survived:
                        break


def chosen(patterns: list[str]) -> list[Case]:
    """The cases whose `group: name` has one of the patterns; all of them where there is none."""
    return [
        case
        for case in CASES
        if not patterns or any(re.search(pattern, f"{case.group}: {case.name}") for pattern in patterns)
    ]


def run(
    cases: list[Case], repeats: int, home: Callable[[], contextlib.AbstractContextManager[Path]], tell: Tell
) -> None:
    for case in [case for case in cases if case.needs()]:
        tell(Outcome(case.name, False, skipped=case.needs()))
    cases = [case for case in cases if not case.needs()]
    for case in [case for case in cases if case.play]:
        for result in case.play(case, repeats):
            tell(result)
    in_deployments([case for case in cases if not case.play], repeats, home, tell)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="cases whose `group: name` matches; --list shows them"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="times each; a case that takes minutes has its own smaller number"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the outcomes there; those that are there already count too"
    )
    parser.add_argument(
        "--stock", action="store_true", help="tell the bad updates to Flower's own FedAvg, once each, and nothing else"
    )
    parser.add_argument(
        "--home", type=Path, metavar="DIR", help="work there and leave the logs and volumes, to look at afterwards"
    )
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{case.group}: {case.name}" for case in chosen(args.only)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process that was started is ended
    os.environ["OMP_NUM_THREADS"] = "1"

    @contextlib.contextmanager
    def home() -> Iterator[Path]:
        if args.home:
            args.home.mkdir(parents=True, exist_ok=True)
            yield Path(tempfile.mkdtemp(dir=args.home.resolve()))
        else:
            with tempfile.TemporaryDirectory(prefix="faults-") as folder:
                yield Path(folder)

    seen: list[Outcome] = outcome.read(args.json) if args.json else []
    new: list[Outcome] = []

    def tell(result: Outcome) -> None:
        print(f"faults: {result}", flush=True)
        new.append(result)
        if args.json:
            outcome.write(args.json, seen + new)

    if args.stock:
        updates.stock(tell=tell)
    else:
        run(chosen(args.only), args.repeats, home, tell)
    print(f"\n{outcome.markdown(seen + new)}")
    return int(outcome.failed(new))


if __name__ == "__main__":
    from bouquet.ended import quietly

    sys.exit(quietly(main))
