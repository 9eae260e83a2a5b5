"""The bundle that this code is: its SHA-256, as `bouquet hub sign` prints it and a site's SuperNode remembers it.

Enters: the folder that `app` was imported from, which Flower unpacked the bundle into, or a checkout.
Leaves: the bundle that is made of it, the same bytes on every machine, or its hash.
Errors: those of Flower's build, for a folder that is no app.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path


def build(folder: Path) -> bytes:
    """A folder's Flower App Bundle (a zip, stored, with fixed dates), as `flwr build` makes it; but no hidden folder is
    looked through, where no part of an app is: Flower takes seconds for .venv.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)  # flwr 1.41 with pathspec 1.1
        from flwr.cli.build import build_fab_from_files
        from flwr.cli.utils import collect_files

        files: dict[str, bytes | Path] = {}
        for entry in folder.resolve().iterdir():
            if entry.is_file() and not entry.is_symlink():
                files[entry.name] = entry
            elif entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                files |= {f"{entry.name}/{name}": file for name, file in collect_files(entry).items()}
        return build_fab_from_files(files)[0]


@functools.cache
def digest() -> str:
    """SHA-256 of this code's Flower App Bundle, 64 hexadecimal digits."""
    return hashlib.sha256(build(Path(__file__).resolve().parents[1])).hexdigest()
