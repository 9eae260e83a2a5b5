"""The sites of this hub: invite, admit, revoke, list; and its run. `scripts/hub` says what a person types.

Enters: names, a site's public key. Leaves: a join kit below .bouquet/kits; a registration at the SuperLink under the site's
name and its copy in certs/admitted (what `docker compose up` registers again in a new state); a table of sites.
Cut off between two steps, a command lets nobody in, and the same command again ends what it began.
Errors: JOIN-01 to JOIN-06, CERT-01, CERT-04, HOST-08 (the hub's own words).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path

from app.errors import BouquetError
from bouquet import ROOT
from bouquet.hub import control, kit, roster

ADMITTED = ROOT / "certs" / "admitted"


def main() -> int:
    args = arguments()
    try:
        if "name" in args:
            check_name(args.name)
        return args.do(args) or 0
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 2 if args.do is status else 1
    except KeyboardInterrupt:
        return 130


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/hub")
    commands = parser.add_subparsers(required=True)
    for do, about in ((invite, "write a join kit"), (admit, "let a site in"), (revoke, "cut a site off"), (sites, "list the sites"), (status, "what the run is doing")):
        command = commands.add_parser(do.__name__, help=about)
        command.set_defaults(do=do)
        if do in (invite, admit, revoke):
            command.add_argument("name", metavar="NAME")
        if do is invite:
            command.add_argument("--hub", metavar="HOST:PORT", help="where the site finds the hub (default: HUB_HOST, HUB_PORT in .env)")
        if do is admit:
            command.add_argument("key", metavar="KEY.pub", type=Path)
            command.add_argument("--images", type=int, metavar="N", help="weigh this site as N images at most, whatever it reports")
            command.add_argument("--fingerprint", metavar="SHA256:…", help="what the site read out; any other key is refused")
        if do in (sites, status):
            command.add_argument("--json", action="store_true")
        if do is status:
            command.add_argument("run", metavar="RUN", nargs="?", default="", type=run_id, help="a run's id; default: the newest")
            command.add_argument("--follow", action="store_true", help="a line for every change until the run has ended")
    return parser.parse_args()


def run_id(text: str) -> str:
    if text and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no run's id")
    return text


def check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise BouquetError("CERT-04", "That is no name for a site.", found=name, fix="use a-z, 0-9 and -")


def invite(args: argparse.Namespace) -> None:
    archive, digest = kit.make(args.name, args.hub)
    print(f"kit    {archive}   send it to the site; it holds no secret")
    print(f"sum    {digest}   sha256sum, for the site to compare")
    print(f"image  {kit.image()}   for a site that cannot pull it: docker save -o bouquet-image.tar {kit.image()}")
    if kit.setting("HUB_BIND", "127.0.0.1").startswith("127."):
        print("note   the hub's port is open on this host alone; for others: HUB_BIND=0.0.0.0 in .env, then docker compose up -d")
    print(f"next   scripts/hub admit {args.name} {args.name}.pub   when the site has sent its public key")


def admit(args: argparse.Namespace) -> None:
    """Register the key under the name. The same key under the same name again is no mistake.

    The hub is asked first: what it refuses leaves all as it was. A site that only the hub knows is in no round.
    Errors: JOIN-02 not a public key, JOIN-03 not the key that was meant, JOIN-04 name or key belongs to another, JOIN-05 revoked.
    """
    key = roster.Key.read(args.key)
    print(f"{args.name}   {key.fingerprint}   {args.key}")
    if not (args.fingerprint == key.fingerprint if args.fingerprint else confirmed()):
        fix = "ask the site for its key and its fingerprint again; somebody may have exchanged the file"
        raise BouquetError("JOIN-03", "This is not the key that the site read out.", found=args.fingerprint or "you said no", fix=fix)
    known = roster.registered()
    for site in known:
        if site.key == key and site.state == "revoked":
            fix = "the site makes a new one: rm site.key && ./site init"
            raise BouquetError("JOIN-05", "This key was revoked.", found=f"as {site.name}, {key.fingerprint}", fix=fix)
        if site.state != "revoked" and (site.name == args.name) != (site.key == key):
            fix = f"choose another name, or first: scripts/hub revoke {site.name}"
            raise BouquetError("JOIN-04", "The name or the key belongs to another site.", found=f"{site.name} has {site.key.fingerprint}", fix=fix)
    if not any(site.key == key for site in known):
        control.register(args.name, key.pem)
    ADMITTED.mkdir(parents=True, exist_ok=True)
    file = ADMITTED / f"{args.name}.pub"
    if args.images is not None:  # before the key: with it the site counts
        write(file.with_suffix(".json"), json.dumps({"images": args.images}) + "\n")
    line = f"{key.line} {args.name}\n"
    if not file.is_file() or file.read_bytes() != line.encode():
        write(file, line)
    print(f"{args.name}   admitted; it is online once its SuperNode has started")


def write(file: Path, content: str) -> None:
    """A public file, in one step."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(content)
    temporary.chmod(0o644)
    temporary.replace(file)


def confirmed() -> bool:
    return not sys.stdin.isatty() or input("Is this what the site read out? [y/N] ").strip().lower() in {"y", "yes"}


def revoke(args: argparse.Namespace) -> None:
    """End the name's registration; its next request is refused with 401. Errors: JOIN-06 no such site."""
    file, nodes = ADMITTED / f"{args.name}.pub", [s.node for s in roster.registered() if s.name == args.name and s.state != "revoked"]
    if not nodes and not file.exists():
        raise BouquetError("JOIN-06", "There is no such site.", found=args.name, fix="scripts/hub sites shows them all")
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
    for node in nodes:
        control.unregister(node)
    print(f"{args.name}   revoked; to come back it needs a new key")


def sites(args: argparse.Namespace) -> None:
    table = roster.table(ADMITTED, kit.KITS)
    if args.json:
        print(json.dumps({"sites": table}, indent=1))
        return
    titles = ("name", "state", "last seen", "images", "GPU", "rounds")
    rows = [titles, *([words(value) for value in row.values()][: len(titles)] for row in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def status(args: argparse.Namespace) -> int:
    from bouquet.hub import status as status_  # the report's modules are of no use to the other commands

    return status_.show(args)


def words(value: object) -> str:
    """A cell for people: '-' for nothing, UTC to the second for a time."""
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value):
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M:%S} UTC"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    from bouquet.ended import quietly

    sys.exit(quietly(main))
