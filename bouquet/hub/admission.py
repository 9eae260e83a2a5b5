"""The sites of this hub: invite, admit, revoke, list; and its run. `bouquet hub` says what a person types.

Enters: names, a site's public key. Leaves: a join kit below .bouquet/kits; a registration at the SuperLink under the
site's name and its copy in certs/admitted (what `docker compose up` registers again in a new state); a table of sites.
Cut off between two steps, a command lets nobody in, and the same command again ends what it began.
Errors: JOIN-01 to JOIN-06, CERT-01, CERT-04, HOST-08 (the hub's own words).
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path

from app import files
from app.errors import BouquetError
from bouquet import ROOT, audit
from bouquet.hub import control, kit, roster

ADMITTED = ROOT / "certs" / "admitted"
PUBLIC = 0o644  # the containers' user reads what is written here


def check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise BouquetError("CERT-04", found=name, fix="use a-z, 0-9 and -")


def invite(name: str, hub: str | None = None) -> None:
    """Write the join kit. hub: HOST:PORT, else what .env says. Errors: CERT-04, those of kit.py."""
    check_name(name)
    archive, digest = kit.make(name, hub)
    audit.note(ADMITTED, "invited", site=name, kit=digest)
    print(f"kit    {archive}   send it to the site; it holds no secret")
    print(f"sum    {digest}   sha256sum, for the site to compare")
    print(f"image  {kit.image()}   for a site that cannot pull it: docker save -o bouquet-image.tar {kit.image()}")
    if kit.setting("HUB_BIND", "127.0.0.1").startswith("127."):
        print(
            "note   the hub's port is open on this host alone; for others: HUB_BIND=0.0.0.0 in .env, then docker"
            " compose up -d"
        )
    print(f"next   scripts/bouquet hub admit {name} {name}.pub   when the site has sent its public key")


def admit(name: str, file: Path, images: int | None = None, fingerprint: str | None = None) -> None:
    """Register the key under the name. The same key under the same name again is no mistake.

    The hub is asked first: what it refuses leaves all as it was. A site that only the hub knows is in no round.
    Errors: JOIN-02 not a public key, JOIN-03 not the key that was meant, JOIN-04 name or key belongs to another,
    JOIN-05 revoked.
    """
    check_name(name)
    key = roster.Key.read(file)
    print(f"{name}   {key.fingerprint}   {file}")
    if not (fingerprint == key.fingerprint if fingerprint else confirmed()):
        fix = "ask the site for its key and its fingerprint again; somebody may have exchanged the file"
        raise BouquetError("JOIN-03", found=fingerprint or "you said no", fix=fix)
    known = roster.registered()
    for site in known:
        if site.key == key and site.state == "revoked":
            fix = "the site makes a new one: rm site.key && ./site init"
            raise BouquetError("JOIN-05", found=f"as {site.name}, {key.fingerprint}", fix=fix)
        if site.state != "revoked" and (site.name == name) != (site.key == key):
            fix = f"choose another name, or first: bouquet hub revoke {site.name}"
            raise BouquetError(
                "JOIN-04",
                found=f"{site.name} has {site.key.fingerprint}",
                fix=fix,
            )
    if not any(site.key == key for site in known):
        control.register(name, key.pem)
    ADMITTED.mkdir(parents=True, exist_ok=True)
    own = ADMITTED / f"{name}.pub"
    if images is not None:  # before the key: with it the site counts
        files.write(own.with_suffix(".json"), json.dumps({"images": images}) + "\n", PUBLIC)
    line = f"{key.line} {name}\n"
    if not own.is_file() or own.read_bytes() != line.encode():
        files.write(own, line, PUBLIC)
    audit.note(ADMITTED, "admitted", site=name, key=key.fingerprint, images=images)
    print(f"{name}   admitted; it is online once its SuperNode has started")


def confirmed() -> bool:
    return not sys.stdin.isatty() or input("Is this what the site read out? [y/N] ").strip().lower() in {"y", "yes"}


def revoke(name: str) -> None:
    """End the name's registration; its next request is refused with 401. Errors: JOIN-06 no such site."""
    check_name(name)
    file, nodes = (
        ADMITTED / f"{name}.pub",
        [s.node for s in roster.registered() if s.name == name and s.state != "revoked"],
    )
    if not nodes and not file.exists():
        raise BouquetError("JOIN-06", found=name, fix="bouquet hub sites shows them all")
    file.unlink(missing_ok=True)
    file.with_suffix(".json").unlink(missing_ok=True)
    for node in nodes:
        control.unregister(node)
    audit.note(ADMITTED, "revoked", site=name)
    print(f"{name}   revoked; to come back it needs a new key")


def sites(as_json: bool = False) -> None:
    """Print the table of sites."""
    table = roster.table(ADMITTED, kit.KITS)
    if as_json:
        print(json.dumps({"sites": table}, indent=1))
        return
    titles = ("name", "state", "last seen", "images", "GPU", "rounds")
    rows = [titles, *([words(value) for value in row.values()][: len(titles)] for row in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def words(value: object) -> str:
    """A cell for people: '-' for nothing, UTC to the second for a time."""
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value):
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M:%S} UTC"
    return "-" if value is None else str(value)
