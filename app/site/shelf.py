"""The files of a site's cache: rows of tensors by key, and a note by key, in one safetensors file that is whole or not
there.

Enters: rows that have the same names, and of each name tensors of one type; their shapes may differ. Leaves: the same.
Errors: OSError where a file cannot be written; one that cannot be read has no rows, and its owner encodes them again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.families.base import Conditions

Rows = dict[str, Conditions]  # by a photo's hash or a caption's digest
Notes = dict[str, str]  # by such a key: why there is no row, or what is said about it


def read_rows(path: Path) -> tuple[Rows, Notes]:
    """Rows by key and notes by key; nothing where there is no file, or one that was cut off (it is encoded again)."""
    try:
        with safe_open(path, "pt") as file:
            note = file.metadata()
            keys, shapes = json.loads(note["keys"]), json.loads(note["shapes"])
            columns = {name: _apart(file.get_tensor(name), shapes[name]) for name in shapes}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return dict(zip(keys, rows, strict=True)), json.loads(note["bad"])
    except FileNotFoundError:
        return {}, {}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        print(f"bouquet: {path.name} is damaged, and what it held is encoded again", flush=True)
        return {}, {}


def _apart(column: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    rows = torch.split(column, [math.prod(shape) for shape in shapes])
    return [row.view(shape) for row, shape in zip(rows, shapes, strict=True)]


def write_rows(path: Path, rows: Rows, bad: Notes) -> None:
    """Each name's rows one after another, flat, and the shape of each: they may differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    names = list(next(iter(rows.values()), {}))
    shapes = {name: [list(row[name].shape) for row in rows.values()] for name in names}
    columns = {name: torch.cat([row[name].flatten() for row in rows.values()]) for name in names}
    note = {"keys": list(rows), "shapes": shapes, "bad": bad}
    save_file(columns, temporary, metadata={key: json.dumps(value) for key, value in note.items()})
    temporary.replace(path)
