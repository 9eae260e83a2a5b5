"""A site's own record of what it sent: one line of JSON a message, in `journal.jsonl` of its cache folder.

Enters: what left. Leaves: nothing; the file stays at the site. With BOUQUET_KEEP_SENT set, every adapter that was sent is kept
beside it as `sent/<hash>.safetensors`, so that the hub's aggregate can be checked against what the sites really sent.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from app.model import Adapter

FILE = "journal.jsonl"


def note(folder: Path, adapter: Adapter | None = None, **entry: Any) -> None:
    """Append one line; a line is written whole or not at all."""
    line = json.dumps({"time": round(time.time(), 3), **entry}) + "\n"
    file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)
    if adapter is not None and os.environ.get("BOUQUET_KEEP_SENT"):
        kept = folder / "sent" / f"{entry['sent']}.safetensors"
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        save_file(adapter, temporary)
        temporary.replace(kept)


def read(folder: Path) -> list[dict[str, Any]]:
    """Every whole line, oldest first."""
    if not (folder / FILE).exists():
        return []
    lines = (folder / FILE).read_text().split("\n")[:-1]  # what follows the last newline was cut off
    return [json.loads(line) for line in lines]
