"""The list of an imagefolder, as Hugging Face's `datasets` has it: metadata.jsonl, a picture's name and caption a line.

Enters: names and captions. Leaves: that file; app/site/photos/captions.py reads it. Errors: OSError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

LIST = "metadata.jsonl"


def line(name: str, caption: str | Sequence[str]) -> str:
    return json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n"


def write(folder: Path, captions: Iterable[tuple[str, str | Sequence[str]]]) -> None:
    """All of them at once, in this order."""
    (folder / LIST).write_text("".join(line(*pair) for pair in captions), encoding="utf-8")
