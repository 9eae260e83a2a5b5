"""A site's own record of what it sent and decided: one line of JSON each, in `journal.jsonl` of its cache folder.

It is the site's audit log (app/audit.py): a message that was answered, with what arrived and what was sent, is a deed
like an approval or a refusal, so there is one file for both and nothing is told twice. A deed that is no answer has
`did`. `bouquet site journal [CACHE]` tells the messages in words, round by round: `./site status` in a join kit;
`bouquet audit` tells all of it, and whether it is as it was written.
Enters: what left. Leaves: nothing; the file stays at the site. With BOUQUET_KEEP_SENT set, every adapter that was sent
is kept beside it as `sent/<hash>.safetensors`, so that the hub's aggregate can be checked against what the sites
really sent.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from app import audit, text

FILE = "journal.jsonl"
WEEK = 7 * 86400  # seconds
SHOWN = 20  # rounds of a run that are told one by one


def note(folder: Path, adapter: dict[str, Any] | None = None, **entry: Any) -> None:
    """A message that was answered: append one line; a line is written whole or not at all."""
    audit.append(folder / FILE, **entry)
    if adapter is not None and os.environ.get("BOUQUET_KEEP_SENT"):
        from safetensors.torch import save_file  # not for who only reads

        kept = folder / "sent" / f"{entry['sent']}.safetensors"
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        save_file(adapter, temporary)
        temporary.replace(kept)


def deed(folder: Path, did: str, **facts: Any) -> None:
    """What the site, or its operator, did beside that; where it cannot be written, a line of the log says so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        audit.append(folder / FILE, did=did, **facts)
    except OSError as error:
        print(f"bouquet: not in the journal: {did} ({type(error).__name__})", flush=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """Every message that was answered, oldest first; a line that a power cut has spoilt is none."""
    if not (folder / FILE).exists():
        return []
    # what follows the last newline was cut off
    lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [entry for line in lines if isinstance(entry := parsed(line), dict) and "did" not in entry]


def parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def told(entries: list[dict[str, Any]], now: float) -> list[str]:
    """The journal in words: a run after the other, each with its latest rounds."""
    if not entries:
        return ["this site has answered no message yet"]
    runs: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        runs.setdefault(str(entry.get("run")), []).append(entry)
    lines = []
    for run, done in runs.items():
        trained = sum(bool(entry.get("sent")) for entry in done)
        lines.append(
            text.printable(
                f"run {run[:40]}  trained in {trained} rounds, measured in {len(done) - trained} more, from"
                f" {when(done[0])} to {when(done[-1])}"
            )
        )
        if len(done) > SHOWN:
            lines.append(f"  {len(done) - SHOWN} earlier rounds are in {FILE}")
        lines += [text.printable(f"  {words(entry)}") for entry in done[-SHOWN:]]
    late = [entry for entry in entries if entry.get("time", 0) > now - WEEK]
    return [*lines, f"in the last seven days: {len({entry.get('run') for entry in late})} runs, {len(late)} messages"]


def words(entry: dict[str, Any]) -> str:
    """One message: what was taken, what was sent."""
    sent = str(entry.get("sent") or "")
    did = (
        f"trained on {entry.get('images')} photos and sent adapter {sent[:8]}"
        if sent
        else "measured the adapter and sent numbers alone"
    )
    did += f", {entry['enlarged']} of its photos enlarged" if entry.get("enlarged") else ""
    return f"round {entry.get('round')}  {when(entry)}  took adapter {str(entry.get('applied'))[:8]}, {did}"


def when(entry: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(entry.get("time", 0)))
