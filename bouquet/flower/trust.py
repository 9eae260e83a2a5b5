"""How old a bundle may be that a site runs: what Flower's check of signatures leaves out.

A signature says who signed and when, and Flower's SuperNode compares the second with nothing: whoever has the hub
could bring back any bundle that a pinned publisher ever signed, with the faults that were mended since. Two rules close
that, the defences of The Update Framework (theupdateframework.io) against freezing and going back, kept at the site:

  age          a signature counts for SITE_TRUST_DAYS (180), and not while it is more than a day ahead of this clock
  no way back  the site remembers for each publisher the newest signature among the bundles that ran here, and runs no
               other bundle that it signed before; the same bundle may come with any, and the same second is not before

One pinned publisher whose signature passes both is enough. A site that has lost its memory has the first rule alone.
Enters: signatures that Flower has verified, this host's clock, the memory.
Leaves: what is wrong with a bundle, or nothing, and the memory brought up to date.
Errors: TRUST-01 (no good signature), -04 (the setting), -06 (age), -07 (way back), -08 (clock), -09 (memory).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DAYS = 180  # that a signature counts, where a site says nothing else
MOST = 36_500  # days: a hundred years
DAY = 86_400  # seconds; also how far a publisher's clock may be ahead of a site's
MEMORY = "publishers.json"  # in the site's cache folder
AGAIN = "the publisher signs it again: bouquet hub sign --again"


class Refusal(NamedTuple):
    """Why a bundle is not run here. `code` and `headline` are public, the rest is for this site's log."""

    code: str
    headline: str
    found: str
    fix: str

    def __str__(self) -> str:
        help = f"docs/troubleshooting.md#{self.code.lower()}"
        return f"{self.code}  {self.headline}\n  found  {self.found}\n  fix    {self.fix}\n  help   {help}"


class Ran(NamedTuple):
    """The bundle (its SHA-256) with a publisher's newest signature among those that ran here."""

    bundle: str
    signed_at: int


def days(setting: str) -> int | Refusal:
    """SITE_TRUST_DAYS as a number; a slip is told, never taken for no limit."""
    if not setting.strip():
        return DAYS
    if setting.strip().isdecimal() and 1 <= (number := int(setting)) <= MOST:
        return number
    fix = f"a whole number of days from 1 to {MOST}; empty is {DAYS}"
    return Refusal("TRUST-04", "The site's own limits cannot be read.", f"SITE_TRUST_DAYS is {setting!r}", fix)


def refusals(bundle: str, signed: Mapping[str, int], memory: Path, now: float, limit: int) -> list[Refusal]:
    """Why the bundle is not run, one reason a publisher. None when one of its good signatures (publisher -> time)
    passes; that one is remembered before anything of the bundle runs."""
    if not signed:
        found = f"bundle {bundle[:12]} without a good signature of a publisher in trusted.yaml"
        fix = "sign it at the hub: bouquet hub sign; or put the new publisher's trusted.yaml here"
        why = "no publisher that it pins has signed this bundle"
        return [Refusal("TRUST-01", f"The site does not trust this code: {why}.", found, fix)]
    try:
        ran = read(memory)
        wrong = {name: fault(bundle, name, at, ran.get(name), now, limit) for name, at in signed.items()}
        good = {name: Ran(bundle, signed[name]) for name, reason in wrong.items() if not reason}
        newer = {name: one for name, one in good.items() if one.signed_at >= ran.get(name, one).signed_at}
        if newer.items() - ran.items():
            write(memory, ran | newer)
    except (OSError, ValueError) as error:
        return [unreadable(memory, error)]
    return [] if good else [reason for reason in wrong.values() if reason]


def fault(bundle: str, publisher: str, signed_at: int, ran: Ran | None, now: float, limit: int) -> Refusal | None:
    """What is wrong with one publisher's good signature, by the two rules."""
    age = (now - signed_at) / DAY
    which = f"bundle {bundle[:12]}, which {publisher} signed"
    if age < -1:
        found = f"{which} {-age:.1f} days ahead of this host's clock"
        fix = f"compare date -u here and there, set the clock that is wrong; if it was the publisher's, {AGAIN}"
        return Refusal("TRUST-08", "The bundle was signed in the future, by the site's clock.", found, fix)
    if age > limit:
        found = f"{which} {age:.1f} days ago; SITE_TRUST_DAYS is {limit}"
        return Refusal("TRUST-06", "The bundle's signature is too old.", found, AGAIN)
    if ran and ran.bundle != bundle and signed_at < ran.signed_at:
        found = f"{which} {ran.signed_at - signed_at} s before bundle {ran.bundle[:12]}, which has run here"
        fix = f"run the newer one; to go back on purpose, {AGAIN}, in the older checkout"
        return Refusal("TRUST-07", "The bundle is older than one that ran at the site before.", found, fix)
    return None


def unreadable(memory: Path, error: Exception) -> Refusal:
    """Nothing runs until a person has looked: to begin anew by itself would let an old bundle in without a word."""
    found = f"{memory}: {type(error).__name__}: {error}"
    fix = "make the folder writable; delete a damaged file: until the next run the signatures' age alone counts"
    return Refusal("TRUST-09", "The site's memory of what ran there cannot be used.", found, fix)


def read(memory: Path) -> dict[str, Ran]:
    """What ran here, by publisher; nothing without a file. Errors: OSError; ValueError for what write() never wrote."""
    try:
        entries = json.loads(memory.read_text())
    except FileNotFoundError:
        return {}
    try:
        ran = {publisher: Ran(**entry) for publisher, entry in entries.items()}
    except (AttributeError, TypeError):
        raise ValueError("not a list of publishers") from None
    if not all(type(one.bundle) is str and type(one.signed_at) is int for one in ran.values()):
        raise ValueError("not a bundle and a time for every publisher")
    return ran


def write(memory: Path, ran: Mapping[str, Ran]) -> None:
    """Replace the memory in one step, mode 0600; also after a cut of power it is the old one or the new one."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    new = memory.with_name(f".{memory.name}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        json.dump({publisher: one._asdict() for publisher, one in ran.items()}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    new.replace(memory)
    folder = os.open(memory.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
