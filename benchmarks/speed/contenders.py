"""The three contenders on one set of photos: each gives its rounds by phase, and what its processes needed.

Enters: a Task. Leaves: Result. Every contender has as many threads a site, and trains and evaluates on as many images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed.watch import Watch, idle_cpu
from bouquet import ROOT
from bouquet.hub.deployment import BIN, Processes, free_port
from bouquet.hub.following import follow
from bouquet.hub.runs import CONNECTION, connect, flwr, start_run

PHASES = ("start", "imports", "load", "encode", "train", "evaluate", "transfer", "wait")
HUB = "hub"
Show = Callable[[str], None]
TASK = {  # a run config, as far as it is the same everywhere
    "base-model": "bench", "resolution": 64, "batch-size": 8, "lora-rank": 8, "lora-targets": "attention",
    "learning-rate": 0.0001, "sample-prompts": "", "precision": "fp32", "validation-timesteps": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What each contender does: `sites` x (`train` + `held_out`) images, `steps` of `batch`, `rounds` times."""

    home: Path
    sites: dict[str, Path]
    train: int
    held_out: int
    steps: int
    batch: int
    rounds: int
    rank: int = 8
    resolution: int = 64

    @property
    def models(self) -> Path:
        return self.home / "models"

    def config(self) -> dict:
        return TASK | {
            "resolution": self.resolution, "rounds": self.rounds, "local-steps": self.steps, "batch-size": self.batch,
            "lora-rank": self.rank, "validation-fraction": round(self.held_out / (self.train + self.held_out), 6),
            "min-sites": len(self.sites),
        }  # fmt: skip


@dataclass
class Result:
    """rounds: phase -> seconds. peak_mb: of a site's largest process; site_mb, hub_mb: of all its processes at once."""

    rounds: list[dict[str, float]]
    peak_mb: float
    site_mb: float = 0.0
    hub_mb: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)


def by_phase(seconds: float, sites: Sequence[Mapping[str, float]], transfer: float = 0.0) -> dict[str, float]:
    """A round as the phases of its slowest site; what neither they nor the hub's transfer explain is `wait`."""
    slowest = max(sites, key=lambda site: sum(site.values()))
    shown = {phase: slowest.get(phase, 0.0) for phase in PHASES[:-2]} | {"transfer": transfer}
    return shown | {"wait": max(0.0, seconds - sum(shown.values()))}


def phases(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("seconds-"): value for key, value in metrics.items() if key.startswith("seconds-")}


class Stock(Processes):
    """The same deployment with Flower's own SuperNode, asking as often as Flower asks."""

    def start_site(self, name: str, hub: str = "") -> None:
        settings = {
            "site-name": name,
            "data-path": self.sites[name],
            "models-path": self.models,
            "cache-path": self.home / "cache" / name,
        }
        self._spawn(name, [
            BIN / "flower-supernode", f"--superlink={self.address}", f"--root-certificates={self.certs}/ca.crt",
            f"--auth-supernode-private-key={self.certs}/{name}.key", "--host=127.0.0.1", f"--port={free_port()}",
            "--node-config=" + " ".join(f"{key}={json.dumps(str(value))}" for key, value in settings.items()),
        ], self.site_env | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"})  # fmt: skip


@contextmanager
def deployed(task: Task, kind: type[Processes], name: str) -> Iterator[tuple[Processes, float]]:
    """The deployment with every site online, and the seconds until it was."""
    home, certs = task.home / name, task.home / "certs"
    running = kind(home, certs, free_port(), task.sites, {"BENCH_SITES": str(len(task.sites))}, models=task.models)
    os.environ["FLWR_HOME"] = str(home / "operator")
    connect(running.address, certs / "ca.crt")
    start = time.monotonic()
    try:
        running.start()
        yield running, time.monotonic() - start
    finally:
        running.stop()


def sessions(running: Processes) -> dict[int, str]:
    """Session id -> site, or `hub` for both of its processes."""
    return {process.pid: name if name in running.sites else HUB for name, process in running.running.items()}


def watched(running: Processes, show: Show, start: Callable[[], str]) -> tuple[str, dict, Watch]:
    """One run to its good end: its id, what `flwr ls` says of it, and what was seen of its processes."""
    watch = Watch(sessions(running))
    watch.start()
    state, details = follow(run := start(), show, timeout=7200)
    watch.stop()
    assert state == "finished:completed", (state, details)
    return run, flwr("ls", CONNECTION, "--run-id", run)["runs"][0], watch


def result(rounds: list[dict[str, float]], watch: Watch, task: Task, ended: dict, **facts: float) -> Result:
    peak = max(watch.message_mb.values())
    wire = ended["network-traffic"]["total-bytes"] / task.rounds / 1e6
    return Result(
        rounds,
        peak,
        max(watch.whole_mb.get(site, 0.0) for site in task.sites),
        watch.whole_mb.get(HUB, 0.0),
        facts | {"wire-mb": wire},
    )


def ours(task: Task, show: Show, idle: float = 0, kind: type[Processes] = Processes) -> Result:
    """A run of the app, and how busy its deployment is when it has nothing to do for `idle` seconds."""
    text, told = " ".join(f"{key}={json.dumps(value)}" for key, value in task.config().items()), []
    with deployed(task, kind, "ours") as (running, up):
        facts = {"up": up}
        if idle:
            time.sleep(15)  # the fork servers import their libraries first
            facts |= {f"idle-{name}-percent": percent for name, percent in idle_cpu(sessions(running), idle).items()}
        start = time.time()
        run, ended, watch = watched(
            running, lambda line: (told.append((time.time(), line)), show(line)), lambda: start_run(text)
        )
        facts["run"] = time.time() - start
        folder = running.fetch(run)
        history = json.loads((folder / "history.json").read_text())
        rounds = []
        for entry in history["rounds"]:
            rounds.append(
                by_phase(
                    entry["seconds"],
                    [phases(metrics) for metrics in entry["sites"].values()],
                    entry.get("transfer", 0.0),
                )
            )
        first = next(at for at, line in told if line.startswith("bouquet: round 1/"))
        # what is left of round 1 after its training is too short to see
        facts["first-step"] = up + first - start - rounds[0]["train"]
        facts["adapter-mb"] = (folder / "final" / "adapter_model.safetensors").stat().st_size / 1e6
        return result(rounds, watch, task, ended, **facts)


def naive(task: Task, show: Show) -> Result:
    config = {
        "rounds": task.rounds,
        "steps": task.steps,
        "batch": task.batch,
        "held-out": task.held_out,
        "rank": task.rank,
        "resolution": task.resolution,
    }
    command = [
        "run",
        str(ROOT / "benchmarks/speed/naive"),
        CONNECTION,
        "--run-config",
        " ".join(f"{k}={v}" for k, v in config.items()),
    ]
    with deployed(task, Stock, "naive") as (running, up):
        start = time.time()
        run, ended, watch = watched(running, show, lambda: flwr(*command)["run-id"])
        noted = json.loads((running.adapters / f"{run}.json").read_text())
    rounds = []
    for entry in noted:
        sites: dict[int, dict[str, float]] = {}
        for message in entry["messages"]:
            site = sites.setdefault(message["node"], {})
            for phase, seconds in phases(message).items():
                site[phase] = site.get(phase, 0.0) + seconds
        rounds.append(by_phase(entry["seconds"], list(sites.values()), entry["transfer"]))
    show(f"naive: {[round(entry['seconds'], 1) for entry in noted]} s a round")
    return result(rounds, watch, task, ended, up=up, run=time.time() - start)


def floor(task: Task, show: Show) -> Result:
    """All sites at once, each in its own warm process, as busy with each other as they are in a federation."""
    running = []
    for name, data in task.sites.items():
        settings = {
            "config": task.config(),
            "models": str(task.models),
            "data": str(data),
            "cache": str(task.home / "floor" / name),
            "rounds": task.rounds,
        }
        Path(settings["cache"]).mkdir(parents=True, exist_ok=True)
        file = task.home / f"floor-{name}.json"
        file.write_text(json.dumps(settings))
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(task.sites)))}
        command = [sys.executable, "-m", "benchmarks.speed.floor", str(file)]
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    rounds = [by_phase(0.0, [site["rounds"][number] for site in said]) for number in range(task.rounds)]
    show(f"floor: {[round(sum(r.values()), 1) for r in rounds]} s a round")
    return Result(rounds, max(site["peak-mb"] for site in said))
