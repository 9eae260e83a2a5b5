"""The demo after set-up: start the deployment, run the app on it, follow it, say where the result is.

  python -m bouquet.demo docker|process [--keep] [--run-config CONFIG]

Leaves: exit code 0 only when `flwr ls` says finished:completed; everything it started is stopped again, also after
Ctrl-C, unless --keep. Where nothing is said for ten seconds, it says what it waits for.
Errors: HOST-05 to HOST-09, HOST-14 and HOST-15 (.env).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from app import text
from app.errors import BouquetError
from bouquet import ROOT, dotenv
from bouquet.hub.deployment import Compose, Processes
from bouquet.hub.following import follow
from bouquet.hub.runs import CONNECTION, flwr, start_run
from bouquet.report import progress

TIMES: list[tuple[str, float]] = []
EVERY = 10  # seconds without a word after which one is said


def main() -> int:
    args = arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    run_id = ""
    try:
        deployment = engine(args.engine)
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 1
    try:
        with timed("start", "for the hub, then for every site to be online"):
            deployment.start()
        with timed("run", "for the run's first word") as heard:
            run_id = start_run(args.run_config)
            say(f"run {run_id} has started; logs: {deployment.logs}")
            view = View(sys.stdout)

            def show(line: str) -> None:
                heard.set()
                view(line)

            state, details = follow(run_id, show)
        if state != "finished:completed":
            raise BouquetError("HOST-09", found=f"{state}: {details}", fix=f"see {deployment.logs}")
        result = deployment.fetch(run_id)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, still_stopping)
        if run_id:
            try:
                flwr("stop", run_id, CONNECTION)
            except BouquetError as error:  # it has ended, or the hub has
                say(text.line(error.found))
        return 130
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except BrokenPipeError:  # `scripts/demo | head`: nobody listens any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, still_stopping)
        if not args.keep:
            try:
                with timed("stop", "for the sites to take leave of the hub, then for the hub"):
                    deployment.stop()
            except BouquetError as error:
                print(error.report(), file=sys.stderr)
    report(result, args)
    return 0


def interrupted(number: int, frame: object) -> None:
    """Say at once what happens; then KeyboardInterrupt, then `finally`."""
    tell("stopping: the run, then the sites and the hub, up to a minute; adapters of finished rounds stay")
    raise KeyboardInterrupt


def still_stopping(number: int, frame: object) -> None:
    tell("stopping already; what this waits for ends by itself")


def tell(words: str) -> None:
    """say(), from within a signal, which may have come in the middle of another word."""
    os.write(1, f"\ndemo: {words}\n".encode())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("docker", "process"))
    parser.add_argument("--keep", action="store_true", help="leave the deployment running")
    parser.add_argument("--run-config", default="", help="as for flwr run: 'rounds=2 local-steps=5', or a .toml file")
    return parser.parse_args()


def engine(name: str) -> Compose | Processes:
    if name == "docker":
        return Compose()
    env = dotenv.settings(ROOT)
    sites = {site: dotenv.path(ROOT, folder) for site, folder in settings_of_sites("DATA", env).items()}
    gpus = settings_of_sites("GPU", env)
    port = dotenv.port(env.get("HUB_PORT") or "8443", "HUB_PORT")
    running = Processes(
        ROOT / ".bouquet", ROOT / "certs", port, sites, trusted=ROOT / "certs" / "trusted.yaml", gpus=gpus
    )
    for switch in ("LIMITS", "TRUST_DAYS", "CHECKPOINTING", "CONSENT", "PRIVACY"):  # each site's own, as compose.yaml
        for site, value in settings_of_sites(switch, env).items():
            running.pins[site] = running.pins.get(site, {}) | {f"SITE_{switch}": value}
    if "SITE_KEEP" in env:
        running.site_env["SITE_KEEP"] = env["SITE_KEEP"]
    return running


def settings_of_sites(setting: str, env: Mapping[str, str]) -> dict[str, str]:
    """site-N -> SITE_N_<setting>, where it is set."""
    found = {f"site-{of[1]}": env[key] for key in env if (of := re.fullmatch(rf"SITE_(\d+)_{setting}", key))}
    return {site: value for site, value in found.items() if value}


def report(result: Path, args: argparse.Namespace) -> None:
    setup = os.environ.get("BOUQUET_TIMES", "")
    lines = Path(setup).read_text().splitlines() if setup else []
    rows = [(name, float(seconds.replace(",", "."))) for name, seconds in (line.split("\t") for line in lines)] + TIMES
    say("  ".join(f"{name} {seconds:.0f} s" for name, seconds in rows) + f"  total {sum(s for _, s in rows):.0f} s")
    here = result.relative_to(ROOT)
    print(f"adapter  {here / 'final' / 'pytorch_lora_weights.safetensors'}")
    if (result / "samples.png").is_file():  # an empty sample-prompts draws nothing
        print(f"picture  {here / 'samples.png'}")
    print(f"next     scripts/bouquet report {here}")
    again = "docker compose up -d --wait" if args.engine == "docker" else f"scripts/demo --engine {args.engine} --keep"
    print("again    " + ("" if args.keep else f"{again} && ") + ".venv/bin/flwr run . remote-deployment --stream")


@contextmanager
def timed(part: str, awaited: str) -> Iterator[threading.Event]:
    """A part that is told and timed; until its event is set, or it ends, a line every ten seconds says what it waits
    for.
    """
    say(part)
    start, heard = time.monotonic(), threading.Event()
    threading.Thread(target=remind, args=(part, awaited, start, heard), daemon=True).start()
    try:
        yield heard
    finally:
        heard.set()
        TIMES.append((part, time.monotonic() - start))


def remind(part: str, awaited: str, start: float, heard: threading.Event) -> None:
    while not heard.wait(EVERY):
        say(f"{part}, {time.monotonic() - start:.0f} s so far: waiting {awaited}")


def say(words: str) -> None:
    print(f"demo: {words}", flush=True)


class View:
    """The server's lines as they come; in a terminal the rounds share one line that renews itself, with the losses so
    far as bars.
    """

    ROUND = re.compile(r"(round \d+/\d+)  train \S+  validation (\S+)  (.*)")

    def __init__(self, out: TextIO) -> None:
        self.out, self.open = out, False
        self.losses: list[float] = []

    def __call__(self, line: str) -> None:
        text = line.removeprefix("bouquet: ")
        found = self.ROUND.fullmatch(text) if self.out.isatty() else None
        if found:
            self.losses.append(float(found[2]))
            self.out.write(
                f"{progress.CLEAR}{found[1]}  validation {progress.sparkline(self.losses)} {found[2]}  {found[3]}"
            )
        else:
            self.out.write("\n" * self.open + text + "\n")
        self.open = bool(found)
        self.out.flush()


if __name__ == "__main__":
    sys.exit(main())
