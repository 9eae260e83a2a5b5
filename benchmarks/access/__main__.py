"""Attack the hub, and Flower's own quickstart beside it, and say what got through where.

  scripts/access                                both, made from the image that is here, and removed afterwards
  scripts/access --ours hub:8443 --ca ca.crt [--key FILE]   a hub that runs: ours alone

Enters: Docker and the project's image (none with --ours); nothing of this checkout's .env, certificates or data is
used or changed.
Leaves: a Markdown table on stdout, .bouquet/access.json; exit 1 when something got through ours, 2 when it could not
be tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from app.errors import BouquetError
from benchmarks.access import door, join, load, run  # noqa: F401
from benchmarks.access.attacks import ATTACKS, THROUGH, Hub, Result, try_all
from benchmarks.access.hubs import ours, outside, prepare, stock
from benchmarks.hostile import Door
from bouquet import ROOT

GROUPS = ("join", "run", "trust", "path", "TLS", "network", "load")
ATTACKS.sort(key=lambda each: GROUPS.index(each.group))


def attack_both(groups: set[str]) -> dict[str, dict[str, Result]]:
    """Both hubs made, attacked at the same time, and removed."""
    network = f"bouquet-access-{os.getpid()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bouquet-access-"))) / "hub"
        host = stack.enter_context(outside(network))
        settings = prepare(folder, host)
        with ThreadPoolExecutor(2) as pool:
            down = {name: stack.enter_context(ExitStack()) for name in ("stock", "ours")}
            made = {
                name: pool.submit(make, folder, network, host, settings, down[name])
                for name, make in (("stock", stock), ("ours", ours))
            }
            hubs = {name: future.result() for name, future in made.items()}
            running = {name: pool.submit(watch, name, hub, groups) for name, hub in hubs.items()}
            return {name: future.result() for name, future in running.items()}


def watch(name: str, hub: Hub, groups: set[str]) -> dict[str, Result]:
    return try_all(hub, groups, lambda line: print(f"access: {name:5}  {line}", file=sys.stderr, flush=True))


def markdown(rows: list[dict]) -> str:
    def cell(result: dict | None) -> str:
        bold = "**" if result and result["verdict"] == THROUGH else ""
        return f"{bold}{result['verdict']}{bold}: {result['got']}".replace("|", "\\|") if result else "-"

    lines = ["| | attack | stock Flower compose | ours |", "|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {row['group']} | {row['attack']} | {cell(row['stock'])} | {cell(row['ours'])} |" for row in rows]
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/access", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ours", metavar="HOST:PORT", help="attack this hub instead, which runs; have its operator's leave"
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="with --ours: its CA certificate")
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="with --ours: the key of an admitted site that is not running, for the attacks of an insider",
    )
    parser.add_argument("--only", nargs="+", default=[], choices=GROUPS, help="these groups of attacks alone")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=ROOT / ".bouquet/access.json",
        help="where the results go (.bouquet/access.json)",
    )
    asked = parser.parse_args()
    if bool(asked.ours) != bool(asked.ca):
        parser.error("--ours and --ca go together")
    return asked


def attack_one(address: str, ca: Path, key: Path | None, groups: set[str]) -> dict[str, dict[str, Result]]:
    host, port = address.rsplit(":", 1)
    site_key = load_ssh_private_key(key.read_bytes(), None) if key else None
    return {"stock": {}, "ours": watch("ours", Hub(Door(host, int(port), ca), site_key=site_key), groups)}


def main() -> int:
    asked = arguments()
    try:
        results = (
            attack_one(asked.ours, asked.ca, asked.key, set(asked.only)) if asked.ours else attack_both(set(asked.only))
        )
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 2
    rows = [
        {"group": each.group, "attack": each.name}
        | {name: vars(found[each.name]) if found else None for name, found in results.items()}
        for each in ATTACKS
        if each.name in results["ours"]
    ]
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    through = [row["attack"] for row in rows if row["ours"]["verdict"] == THROUGH]
    print(markdown(rows))
    print(
        f"\naccess: {len(through)} attacks got through ours{': ' if through else ''}{'; '.join(through)}",
        file=sys.stderr,
    )
    return int(bool(through))


if __name__ == "__main__":
    from bouquet.ended import quietly

    sys.exit(quietly(main))
