"""The demo after set-up: start the deployment, run the app on it, follow it, say where the result is.

  python scripts/_demo.py docker|process [--keep] [--run-config CONFIG]

Leaves: exit code 0 only when `flwr ls` says finished:completed; everything it started is stopped again, also after
Ctrl-C, unless --keep.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.errors import BouquetError  # noqa: E402
from scripts._deployment import Compose, Processes  # noqa: E402
from scripts._flower import CONNECTION, flwr, follow, start_run  # noqa: E402
from scripts._report import progress  # noqa: E402

TIMES: list[tuple[str, float]] = []


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end in KeyboardInterrupt, then in `finally`
    deployment, run_id = engine(args.engine), ""
    try:
        with timed("start"):
            deployment.start()
        with timed("run"):
            run_id = start_run(args.run_config)
            say(f"run {run_id} has started; logs: {deployment.logs}")
            state, details = follow(run_id, View(sys.stdout))
        if state != "finished:completed":
            raise BouquetError("HOST-09", "The run failed.", found=f"{state}: {details}", fix=f"see {deployment.logs}")
        result = deployment.fetch(run_id)
    except KeyboardInterrupt:
        say("stopping")
        if run_id:
            flwr("stop", run_id, CONNECTION)
        return 130
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not args.keep:
            with timed("stop"):
                deployment.stop()
    report(result, args)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("docker", "process"))
    parser.add_argument("--keep", action="store_true", help="leave the deployment running")
    parser.add_argument("--run-config", default="", help="as for flwr run: 'rounds=2 local-steps=5', or a .toml file")
    return parser.parse_args()


def engine(name: str) -> Compose | Processes:
    if name == "docker":
        return Compose()
    env = dict(line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if "=" in line) | os.environ
    sites = {site: ROOT / folder for site, folder in settings_of_sites("DATA", env).items()}
    gpus = settings_of_sites("GPU", env)
    return Processes(ROOT / ".bouquet", ROOT / "certs", int(env["HUB_PORT"]), sites, trusted=ROOT / "certs" / "trusted.yaml", gpus=gpus)


def settings_of_sites(setting: str, env: Mapping[str, str]) -> dict[str, str]:
    """site-N -> SITE_N_<setting>, where it is set; without the quotation marks that .env may have."""
    found = {f"site-{of[1]}": env[key].strip("\"'") for key in env if (of := re.fullmatch(rf"SITE_(\d+)_{setting}", key))}
    return {site: value for site, value in found.items() if value}


def report(result: Path, args: argparse.Namespace) -> None:
    setup = os.environ.get("BOUQUET_TIMES", "")
    rows = [line.split("\t") for line in Path(setup).read_text().splitlines()] if setup else []
    rows = [(name, float(seconds)) for name, seconds in rows] + TIMES
    say("  ".join(f"{name} {seconds:.0f} s" for name, seconds in rows) + f"  total {sum(s for _, s in rows):.0f} s")
    here = result.relative_to(ROOT)
    print(f"adapter  {here / 'final' / 'pytorch_lora_weights.safetensors'}")
    if (result / "samples.png").is_file():  # an empty sample-prompts draws nothing
        print(f"picture  {here / 'samples.png'}")
    print(f"next     scripts/report {here}")
    again = "docker compose up -d --wait" if args.engine == "docker" else f"scripts/demo --engine {args.engine} --keep"
    print("again    " + ("" if args.keep else f"{again} && ") + ".venv/bin/flwr run . remote-deployment --stream")


@contextmanager
def timed(part: str) -> Iterator[None]:
    say(part)
    start = time.monotonic()
    try:
        yield
    finally:
        TIMES.append((part, time.monotonic() - start))


def say(words: str) -> None:
    print(f"demo: {words}", flush=True)


class View:
    """The server's lines as they come; in a terminal the rounds share one line that renews itself, with the losses so far as bars."""

    ROUND = re.compile(r"(round \d+/\d+)  train \S+  validation (\S+)  (.*)")

    def __init__(self, out: TextIO) -> None:
        self.out, self.losses, self.open = out, [], False

    def __call__(self, line: str) -> None:
        text = line.removeprefix("bouquet: ")
        found = self.ROUND.fullmatch(text) if self.out.isatty() else None
        if found:
            self.losses.append(float(found[2]))
            self.out.write(f"{progress.CLEAR}{found[1]}  validation {progress.sparkline(self.losses)} {found[2]}  {found[3]}")
        else:
            self.out.write("\n" * self.open + text + "\n")
        self.open = bool(found)
        self.out.flush()


if __name__ == "__main__":
    sys.exit(main())
