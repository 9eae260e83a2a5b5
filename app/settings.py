"""A base model's small files: JSON and text, read within bounds or refused by name.

Enters: paths in a folder in diffusers' layout. Leaves: objects, bytes, or MODEL-03 (incomplete or damaged), whatever a
reader of somebody else's file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app.errors import ModelError

LARGEST = 64_000_000  # bytes of a text file: a tokenizer's are some


def read_json(path: Path) -> dict[str, Any]:
    """An object. Errors: MODEL-03."""
    with readable(path):
        found = json.loads(read_text(path).decode())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    return found


def read_text(path: Path) -> bytes:
    """Errors: MODEL-03."""
    if not path.is_file():
        raise incomplete(f"{path} is missing, or no file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise incomplete(f"{path} has more than {LARGEST} bytes")
    return data


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is read of a base model within. Errors: MODEL-03, whatever its reader says, unless it lacks GPU memory."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise incomplete(f"{path} cannot be read: {type(error).__name__} {error}"[:500]) from error


def incomplete(found: str) -> ModelError:
    fix = "copy the whole model in diffusers layout, weights as safetensors: model_index.json and every part it names"
    return ModelError("MODEL-03", found=found, fix=fix)


def length(value: object) -> int:
    """A number of tokens; 0 for what is none, as the 1e30 is that many published tokenizers leave it at."""
    return int(value) if isinstance(value, int | float) and type(value) is not bool and 1 <= value < 1e9 else 0
