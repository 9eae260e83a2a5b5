"""Audit logs: the hub operator's is written here; every log is told, and whether it is as it was written.

  bouquet audit [LOG ...] [--head HASH] [--json]

What the operator's commands do (invite, admit, revoke, sign, publish) is in certs/admitted/audit.jsonl, beside the keys
that it tells of: the host and the operator's container both write there, and the backup has it. What runs did is in
audit.jsonl of the shared volume, which the ServerApp writes, and what a site did in its journal. None is moved.
Enters: a deed; files of lines. Leaves: the line; the logs in words or as JSON, each with its head.
Errors: AUDIT-01 (not as it was written, or the kept head is not in it), AUDIT-02 (no log).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app import audit, text
from app.errors import BouquetError

FILE = "audit.jsonl"  # the hub's
JOURNAL = "journal.jsonl"  # a site's (app/site/journal.py)
SHAPE = ("time", "by", "did", "prev", "torn", "log")  # of a line; the rest are its facts


def note(folder: Path, did: str, **facts: Any) -> None:
    """A deed of the hub's operator, in the log of that folder. It was done: where the log cannot be written, that is
    said.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = not (folder / FILE).exists()
        audit.append(folder / FILE, did=did, **facts)
        if new and os.geteuid() == 0:  # the folder's owner writes here too: the operator's container
            os.chown(folder / FILE, folder.stat().st_uid, folder.stat().st_gid)
    except OSError as error:
        print(f"note   not in the audit log: {did} ({folder / FILE}: {error.strerror or error})", file=sys.stderr)


def show(named: list[Path], head: str, as_json: bool) -> None:
    """Print the logs, and say what is wrong with them. Errors: AUDIT-01, AUDIT-02."""
    found = {where: audit.check(content) for where, content in (given(named) if named else here()).items()}
    if as_json:
        print(json.dumps({"logs": [told(where, log) for where, log in found.items()]}, indent=1))
    else:
        print("\n\n".join("\n".join(words(where, log)) for where, log in found.items()))
    wrong = [f"{where}: {fault}" for where, log in found.items() for fault in log.faults]
    if head and not any(head in log.hashes for log in found.values()):
        wrong.append(f"no line has the hash {head[:64]}: the end was cut off, or the log was written anew")
    if wrong:
        fix = "compare with a copy, from a backup; who may write the file is who can have changed it"
        raise BouquetError("AUDIT-01", found="\n".join(wrong), fix=fix)


def told(where: str, log: audit.Checked) -> dict[str, Any]:
    """For programs: all but the lines' hashes."""
    return {"file": where} | {key: value for key, value in asdict(log).items() if key != "hashes"}


def words(where: str, log: audit.Checked) -> list[str]:
    """For people: a line a deed, then the head to keep."""
    earlier = [f"before   {log.earlier} lines from before there was a chain"] if log.earlier else []
    lines = [f"log      {where}   id {log.log[:32]}", *earlier, *map(deed, log.entries)]
    lines += [f"torn     {piece}" for piece in log.torn]
    lines += [f"changed  {fault}" for fault in log.faults]
    return [text.printable(line) for line in [*lines, f"head     {log.head}   {len(log.entries)} lines"]]


def deed(entry: audit.Entry) -> str:
    when: Any = entry.get("time")
    seconds = when if type(when) in (int, float) and 0 <= when < 1e11 else 0
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    facts = "  ".join(f"{key}={brief(value)}" for key, value in entry.items() if key not in SHAPE)
    return f"{clock} UTC  {entry.get('by')}  {entry.get('did', 'answered')}  {facts}"[: 2 * text.MOST].rstrip()


def brief(value: Any) -> str:
    """A fact; of a hash the beginning."""
    said = value if isinstance(value, str) else json.dumps(value)
    return said[:12] if len(said) == 64 else said


def given(named: list[Path]) -> dict[str, bytes]:
    """Logs by name: files, or the folders that they lie in. Errors: AUDIT-02."""
    found: dict[str, bytes] = {}
    for path in named:
        inside = [path / name for name in (FILE, JOURNAL) if (path / name).is_file()]
        try:
            found |= {str(file): file.read_bytes() for file in inside or [path]}
        except OSError as error:
            raise none(f"{path}: {error.strerror}") from None
    return found


def here() -> dict[str, bytes]:
    """Those of the hub and of the site that are on this machine. Errors: AUDIT-02."""
    from bouquet.hub import adapters, admission

    runs, cache = adapters.folder(), Path(os.environ.get("BOUQUET_CACHE") or "/cache")
    files = [admission.ADMITTED / FILE, *([runs / FILE] if runs else []), cache / JOURNAL]
    found = {str(file): file.read_bytes() for file in files if file.is_file()}
    if runs is None and (content := adapters.inside(f"cat /adapters/{FILE} 2>/dev/null")):
        found[f"serverapp:/adapters/{FILE}"] = content
    if not found:
        raise none("none of " + ", ".join(map(str, files)))
    return found


def none(found: str) -> BouquetError:
    fix = "name one: bouquet audit FILE; the first deed, run or message makes it"
    return BouquetError("AUDIT-02", found=found, fix=fix)
