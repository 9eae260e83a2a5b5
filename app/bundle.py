"""The bundle that this code is: its SHA-256, as `bouquet hub sign` prints it and a site's SuperNode remembers it.

Enters: the folder that `app` was imported from, which Flower unpacked the bundle into, or a checkout.
Leaves: the hash of the bundle that is made of it, the same bytes on every machine.
Errors: those of Flower's build, for a folder that is no app.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path


@functools.cache
def digest() -> str:
    """SHA-256 of this code's Flower App Bundle, 64 hexadecimal digits."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)  # flwr 1.41 with pathspec 1.1
        from flwr.cli.build import build_fab_from_disk

        return hashlib.sha256(build_fab_from_disk(Path(__file__).resolve().parents[1])).hexdigest()
