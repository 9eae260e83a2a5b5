"""A large adapter through the real deployment: three sites, TLS, the gateway's own configuration, the SuperLink.

  scripts/bench large [--tiny] [--json FILE]                 --tiny breaks one round alone, by a reset

Enters: nothing; the base model has random weights and the photos are noise. Leaves: a Markdown table and JSON. One run
of three rounds is left alone: its seconds, a site's bytes, the hub's memory and the size of its database, by round. In
another, a site's push of its adapter is broken off half way: by a reset of its connection, by SIGKILL of its SuperNode,
by SIGKILL of the SuperLink; each round has to end with all three sites. A third goes on after it with `resume`.
The gateway is nginx of the image `bouquet:cpu` with docker/gateway.conf, in which only the SuperLink's address is
another; without Docker, or without that image, the sites go straight to the SuperLink, and the last line says so.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.control import read
from benchmarks.faults.bench import RUN, Bench
from benchmarks.faults.hub import LIMIT
from benchmarks.faults.network import Relay
from benchmarks.speed import base, watch
from benchmarks.speed.__main__ import keep, machine, show
from bouquet import ROOT
from bouquet.hub.deployment import free_port

IMAGE = "bouquet:cpu"
LARGE = {"lora-rank": 512, "wire-precision": "fp16", "local-steps": 1, "batch-size": 2, "learning-rate": 1e-4}
ROUNDS, BROKEN = 3, 3  # rounds of the run that is left alone, and of the one that is not
HUB = ("superlink", "serverapp")
Break = Callable[["Large"], object]


def configured(port: int, superlink: int) -> str:
    """docker/gateway.conf with the gateway's port, and the SuperLink's on this host."""
    text = (ROOT / "docker/gateway.conf").read_text()
    text = re.sub(r"resolver .*\n", "\n", text).replace("listen 8443 ssl", f"listen 127.0.0.1:{port} ssl")
    text = text.replace("listen 127.0.0.1:8080", f"listen 127.0.0.1:{free_port()}")
    return text.replace("https://$superlink:8000", f"https://127.0.0.1:{superlink}")


@contextmanager
def gateway(home: Path, certs: Path, superlink: int) -> Iterator[int]:
    """The port where sites go: the gateway's, or the SuperLink's own where there is no image of it."""
    have = ["docker", "image", "inspect", IMAGE]
    try:
        there = subprocess.run(have, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        there = False
    if not there:
        yield superlink
        return
    port, name = free_port(), f"bouquet-large-{superlink}"
    (conf := home / "gateway.conf").write_text(configured(port, superlink))
    files = {conf: "/gateway.conf", certs / "superlink.crt": "/superlink.crt", certs / "ca.crt": "/ca.crt"}
    files[certs / "superlink.key"] = "/run/secrets/superlink.key"
    mounts = [part for here, at in files.items() for part in ("-v", f"{here}:{at}:ro")]
    command = ["docker", "run", "--rm", "--name", name, "--network", "host", "--user", "0", *mounts, IMAGE]
    with (home / "gateway.log").open("w") as log:
        running = subprocess.Popen([*command, "nginx", "-c", "/gateway.conf"], stdout=log, stderr=log)
    try:
        yield port
    finally:
        subprocess.run(["docker", "stop", "-t", "1", name], capture_output=True)
        running.wait(60)


class Large(Bench):
    """The deployment; site-3 goes through a relay that counts, and may break."""

    def __init__(self, home: Path, kind: str, relay: Relay) -> None:
        super().__init__(home, hub_for_site_3=f"127.0.0.1:{relay.port}")
        base.build(home / "models", kind)
        self.models, self.env["BOUQUET_MODELS"] = home / "models", str(home / "models")
        self.relay, self.entrance = relay, self.port

    def start_site(self, name: str, hub: str = "") -> None:
        super().start_site(name, hub or f"127.0.0.1:{self.entrance}")


class Sampler(threading.Thread):
    """The hub's memory (MB, shared pages once) and its database, the most in each round."""

    def __init__(self, bench: Large, run: str) -> None:
        super().__init__(daemon=True)
        self.bench, self.folder, self.ended = bench, bench.adapters / run, threading.Event()
        self.most: dict[int, dict[str, float]] = {}

    def run(self) -> None:
        while not self.ended.wait(0.5):
            number = int(read(self.folder / "status.json").get("round") or 0)
            at = self.most.setdefault(number, dict.fromkeys((*HUB, "database"), 0.0))
            now = dict.fromkeys(HUB, 0.0)
            sessions = {self.bench.running[name].pid: name for name in HUB}
            for name, process in watch.processes(sessions):
                with suppress(OSError):
                    now[name] += process.megabytes("smaps_rollup", "Pss")
            now["database"] = sum(f.stat().st_size for f in (self.bench.home / "state").glob("superlink.db*")) / 1e6
            for name, value in now.items():
                at[name] = max(at[name], value)

    def stop(self) -> dict[int, dict[str, float]]:
        self.ended.set()
        self.join()
        return self.most


def once_pushed(bench: Large, number: int, run: str, bytes_: int) -> None:
    """Wait until site-3 has pushed so much of its reply in that round."""
    bench.until(
        lambda: read(bench.adapters / run / "status.json").get("round") == number,
        2 * LIMIT,
        f"round {number}",
        pause=0.02,
    )
    before = bench.relay.pushed
    bench.until(lambda: bench.relay.pushed > before + bytes_, LIMIT, f"{bytes_} bytes of a push", pause=0.001)


def broken(bench: Large, run: str, half: int, rounds: int) -> list[str]:
    """A break in each of so many rounds, in the middle of site-3's push; what was done."""
    breaks: dict[str, Break] = {
        "connection reset": lambda b: setattr(b.relay, "reset_after", 1),
        "SIGKILL of the site's SuperNode": lambda b: b.signal_all("site-3", signal.SIGKILL),
        "SIGKILL of the SuperLink": lambda b: b.signal("superlink", signal.SIGKILL),
    }
    chosen = dict(list(breaks.items())[:rounds])
    for number, (name, fault) in enumerate(chosen.items(), start=1):
        once_pushed(bench, number, run, half)
        fault(bench)
        show(f"round {number}: {name} after {half / 1e6:.2g} MB of a site's push")
    return list(chosen)


def rounds_of(bench: Large, run: str) -> list[dict]:
    """What history.json says of the rounds. Errors: AssertionError where the run did not complete with all sites."""
    state = bench.wait_for_end(run, 4 * LIMIT)
    said = json.loads((bench.adapters / run / "history.json").read_text())
    assert state == "finished:completed", (state, bench.log("serverapp")[-2000:])
    assert all(len(entry["sites"]) == len(bench.sites) for entry in said["rounds"]), said["rounds"]
    return said["rounds"]


def measured(home: Path, tiny: bool) -> dict:
    relay, config = Relay(), RUN | LARGE | {"base-model": "bench", "round-timeout": 200}
    calm_rounds, rounds = (1, 1) if tiny else (ROUNDS, BROKEN)
    bench = Large(home, "tiny" if tiny else "wide", relay)
    if tiny:
        del bench.sites["site-2"]
        config |= {"lora-rank": 64, "round-timeout": 60, "min-sites": len(bench.sites)}
    with gateway(home, bench.certs, bench.port) as entrance:
        bench.entrance = relay.target = entrance
        try:
            with bench:
                run = bench.start_run(config | {"rounds": calm_rounds})
                sampler = Sampler(bench, run)
                sampler.start()
                calm = rounds_of(bench, run)
                file = bench.adapters / run / f"round-{calm_rounds:04d}" / "adapter_model.safetensors"
                numbers = file.stat().st_size / 4
                hub, pushed, pulled = sampler.stop(), relay.pushed, relay.pulled
                run = bench.start_run(config | {"rounds": rounds})
                faults = broken(bench, run, int(numbers), rounds)  # bytes: half of a reply in fp16
                rough = rounds_of(bench, run)
                bench.all_online()
                run = bench.start_run(config | {"rounds": rounds + 1, "resume": run})
                resumed = rounds_of(bench, run)
        finally:
            relay.close()
    return {
        "gateway": entrance != bench.port, "numbers": numbers, "calm": [entry["seconds"] for entry in calm],
        "hub": hub, "pushed-mb": pushed / 1e6, "pulled-mb": pulled / 1e6, "faults": faults,
        "broken": [entry["seconds"] for entry in rough], "refused": [len(entry["refused"]) for entry in rough],
        "resumed": [entry["seconds"] for entry in resumed[rounds:]],
    }  # fmt: skip


def table(found: dict) -> str:
    lines = ["| round | seconds | SuperLink, MB | ServerApp, MB | database, MB |", "| --- |" + " --- |" * 4]
    for number, seconds in enumerate(found["calm"], start=1):
        hub = found["hub"].get(number, {})
        lines.append(f"| {number} | {seconds:.1f} | " + " | ".join(f"{value:.0f}" for value in hub.values()) + " |")
    lines += [
        "",
        "| in the middle of a site's push | seconds of the round | sites | refused |",
        "| --- |" + " --- |" * 3,
    ]
    rows = zip(found["faults"], found["broken"], found["refused"], strict=True)
    lines += [f"| {name} | {seconds:.1f} | 3 of 3 | {refused} |" for name, seconds, refused in rows]
    lines += [f"| nothing, after `resume` | {found['resumed'][0]:.1f} | 3 of 3 | 0 |", ""]
    way = "through the gateway" if found["gateway"] else "straight to the SuperLink: no Docker or no image bouquet:cpu"
    lines.append(
        f"{found['numbers'] / 1e6:.1f} M numbers in fp16, {way}; the whole run: {found['pushed-mb']:.0f} MB up"
    )
    lines[-1] += f" and {found['pulled-mb']:.0f} MB down a site"
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
        found = measured(Path(home), args.tiny)
    print(table(found))
    print(f"\n{machine()}; {time.monotonic() - start:.0f} s; {args.json}")
    keep(args.json, {"machine": machine(), **found})
    return 0
