"""Bad updates over the wire: site-3 does wrong in every round but the first, each time in another way, and the hub
takes the honest sites' mean.

Enters: the number of repeats. Leaves: an outcome a lie. stock() has the same lies told to Flower's own FedAvg, one a
run.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from app import bases, model
from app.config import RunConfig
from app.site import journal
from benchmarks import check
from benchmarks.faults.bench import HOSTILE, RUN, Bench
from benchmarks.faults.case import Case, judge, lost
from benchmarks.faults.hostile import lies
from benchmarks.faults.hub import LIMIT, Late
from benchmarks.faults.outcome import Outcome
from bouquet import ROOT

REFUSED = [*lies.LIES, *lies.WIRE, "no GPU memory, nor with half"]  # that round goes on without the site
TAKEN = ["a replayed reply", "no GPU memory at first"]  # the site's true reply counts
ALL = REFUSED + TAKEN
# in that site's log, once it was so: what hostile/ says of itself
SEEN = {"a replayed reply": "hostile: the first", "no GPU memory at first": "hostile: memory again, for 2 images"}
FIRST = 2  # round 1 is honest: there must be something to replay
# bytes of address space that the hub's ServerApp may have: what holds a bomb where nothing else does
MEMORY = 12 << 30


@contextmanager
def hostile(home: Path) -> Iterator[tuple[Bench, Path]]:
    """The deployment with such a site, and the file that says what it does in which round."""
    file = home / "wrong.json"
    with Bench(home, site_3={"PYTHONPATH": f"{HOSTILE}:{ROOT}", "BOUQUET_WRONG": str(file)}) as bench:
        resource.prlimit(bench.running["serverapp"].pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        yield bench, file


def play(case: Case, repeats: int, names: list[str] = ALL) -> list[Outcome]:
    """Every lie once a repeat."""
    with tempfile.TemporaryDirectory(prefix="faults-") as home, hostile(Path(home)) as (bench, file):
        return [outcome for _ in range(repeats) for outcome in one_run(bench, file, names)]


def one_run(bench: Bench, file: Path, names: list[str]) -> list[Outcome]:
    """One run, a round for each of the names."""
    file.write_text(json.dumps(dict(enumerate(names, FIRST))))
    bench.all_online()
    before, start = check.adapters(bench.adapters), time.monotonic()
    run = bench.start_run(RUN | {"rounds": 1 + len(names), "min-sites": 2})
    try:
        state = bench.wait_for_end(run, LIMIT + 20 * len(names))
    except Late as late:
        return [Outcome(name, False, problems=[str(late)]) for name in names]
    common = judge(bench, run, state, before, time.monotonic() - start, LIMIT + 20 * len(names))
    common += [f"the run ended {state}: {bench.said(run).get('error')}"] * (state != "finished:completed")
    rounds = {entry["round"]: entry for entry in bench.evidence(run).history()["rounds"]}
    outcomes = []
    for number, name in enumerate(names, FIRST):
        problems = common + verdict(name, rounds.get(number), bench.log("site-3"))
        outcomes.append(Outcome(name, not problems, None, lost(problems), problems))
    return outcomes


def verdict(name: str, entry: dict | None, log: str) -> list[str]:
    """What is wrong with that round: the liar alone must be refused, and by name; what proves no lie must count."""
    if entry is None:
        return ["there was no such round"]
    refused = [each["site"] for each in entry["refused"]]
    counted = sorted(entry["adapters"])
    wanted = (["site-3"], ["site-1", "site-2"]) if name in REFUSED else ([], ["site-1", "site-2", "site-3"])
    problems = [] if (refused, counted) == wanted else [f"refused: {entry['refused']}, counted: {counted}"]
    return problems + ["the fault did not happen"] * (SEEN.get(name, "") not in log)


# --- the other column
# ------------------------------------------------------------------------------------------------------------


def stock_app(home: Path) -> Path:
    """Our app with Flower's FedAvg and a naive save in the ServerApp's place (stock.py)."""
    app = home / "stock"
    shutil.copytree(ROOT / "app", app / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("stock.py"), app / "app" / "stock.py")
    project = (ROOT / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(
        project.replace("app.hub.server_app:app", "app.stock:app").replace(
            "app.site.client_app:app", "app.stock:client"
        )
    )
    return app


def stock(names: list[str] = REFUSED[:-1], tell: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Each lie in the second of two rounds of FedAvg, over the wire, once."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, hostile(Path(folder)) as (bench, file):
        app = stock_app(Path(folder))
        for name in names:
            file.write_text(json.dumps({2: name}))
            bench.all_online()
            run = bench.start_run(RUN | {"rounds": 2}, app)
            try:
                state = bench.wait_for_end(run)
            except Late as late:
                state = str(late)
            problems = [f"the run ended {state}"] * (state != "finished:completed")
            problems += against_the_honest(bench, run)
            outcomes.append(Outcome(name, not problems, problems=problems, hub="stock"))
            tell(outcomes[-1])
    return outcomes


def against_the_honest(bench: Bench, run: str) -> list[str]:
    """The checker's questions to the file that the plain FedAvg app saved; honest is the mean of what the two others
    sent last.
    """
    sent = {}
    for site in ("site-1", "site-2"):
        for line in journal.read(bench.caches[site]):
            if line["run"] == run and line["sent"]:
                sent[site] = line["images"], load_file(bench.caches[site] / "sent" / f"{line['sent']}.safetensors")
    config = RunConfig.read(RUN)
    like = model.new_adapter(bases.locate(config.base_model, ROOT / "models"), config)
    file = bench.adapters / f"stock-{run}.safetensors"
    problems = check.check_stock(file, like, check.mean(list(sent.values())))
    file.unlink(missing_ok=True)
    return problems


CASES = [Case("updates", "bad updates", play=play)]
