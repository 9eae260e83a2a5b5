"""The hub's shared volume as its operator sees it: a folder of this host, or a Docker volume that a container reads
for us.

Enters: BOUQUET_ADAPTERS or .bouquet/adapters; under Docker the service `serverapp`. Leaves: runs' history.json and
status.json.
Errors: REPORT-01 (no run there).
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app import records
from app.errors import BouquetError
from app.hub import history
from app.hub.history import History
from bouquet import ROOT

SMALL = (history.FILE, history.STATUS)


def folder() -> Path | None:
    """Where the runs are on this host; None when they are in the Docker volume alone."""
    if "BOUQUET_ADAPTERS" not in os.environ and _engine() == "docker":
        return None
    return Path(os.environ.get("BOUQUET_ADAPTERS", ROOT / ".bouquet" / "adapters"))


def histories() -> Iterator[History]:
    """Every run's history.json that can be read, oldest first."""
    if (here := folder()) is None:
        each = "for it in $(ls -tr /adapters/*/history.json); do [ -L ${it%/*} ] || { cat $it; printf '\\0'; }; done"
        yield from filter(None, map(_history, inside(each).split(b"\0")))
        return
    files = [file for file in here.glob("*/history.json") if not file.parent.is_symlink()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        if told := _history(file.read_bytes()):
            yield told


def run(name: str, copies: Path) -> Path:
    """The folder of a run, or of the newest where `name` is empty; from a Docker volume its small files are copied
    below `copies`.
    """
    if (here := folder()) is None:
        choose = (
            f"cd /adapters && run={name} && "
            if name
            else "cd /adapters && run=$(ls -t */history.json | head -n 1) && run=${run%/*} && "
        )
        archive = inside(choose + "tar -c $(ls " + " ".join(f"$run/{file}" for file in SMALL) + " 2>/dev/null)")
        if archive:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                names = tar.getnames()
                safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
                tar.extractall(copies, **safe)
            return copies / names[0].split("/")[0]
        here = copies
    files = [file for file in here.glob(f"{name or '*'}/history.json") if not file.parent.is_symlink()]
    if not files:
        fix = "start one: flwr run . remote-deployment; under Docker the hub must be up: docker compose up -d"
        raise BouquetError("REPORT-01", found=f"{name or 'none'} on the shared volume", fix=fix)
    return max(files, key=lambda file: file.stat().st_mtime).parent


def _history(content: bytes) -> History | None:
    """None for one that is torn, as after a crash of the machine: it says nothing, and must not hide the others."""
    try:
        return records.parse(History, content)
    except records.Unfit:
        return None


def inside(script: str) -> bytes:
    """What a shell in the ServerApp's container prints; nothing where there is none."""
    command = ["docker", "compose", "exec", "-T", "serverapp", "sh", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL).stdout


def _engine() -> str:
    file = ROOT / ".bouquet" / "engine"
    return file.read_text().strip() if file.is_file() else ""
