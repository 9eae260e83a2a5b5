"""The hub's page: its sites, the run that works now, and every earlier one with its report and its files.

  bouquet hub page [--port 8445]     http://127.0.0.1:8445, for this host alone, until Ctrl-C
  docker compose --profile dashboard up -d --wait page     the same where the hub runs in containers

It only shows: it has no form, and answers nothing but GET. Starting, stopping and admitting stay on the command line.
Enters: the runs' folders, and the hub's list of sites. Leaves: pages. Errors: HOST-04 (the port is taken), LIVE-01 (no
folder of runs here).
"""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path

import uvicorn

from app.errors import BouquetError
from bouquet.hub import adapters
from bouquet.hub.live.server import application
from bouquet.hub.live.sites import Sites

PORT = 8445


def serve(host: str = "127.0.0.1", port: int = PORT) -> None:
    """Until Ctrl-C. Errors: HOST-04, LIVE-01."""
    runs, door = folder(), listen(host, port)
    with door, Sites() as sites:
        print(f"live: http://127.0.0.1:{door.getsockname()[1]}   Ctrl-C ends it", flush=True)
        config = uvicorn.Config(
            application(runs, sites.now),
            log_level="warning",
            server_header=False,
            access_log=False,
            lifespan="off",
            ws="none",
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[door])


def folder() -> Path:
    """Where the runs are. Errors: LIVE-01."""
    if (found := adapters.folder()) is None or not found.is_dir():
        raise BouquetError(
            "LIVE-01",
            found=f"no {found}" if found else "this hub runs in containers, and its runs are on a volume",
            fix=(
                "docker compose --profile dashboard up -d --wait page"
                if found is None
                else "start a run first, or set BOUQUET_ADAPTERS"
            ),
        )
    return found


def listen(host: str, port: int) -> socket.socket:
    """Errors: HOST-04."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
        door.listen()
    except OSError as error:
        door.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        fix = "bouquet hub page --port ANOTHER"
        raise BouquetError("HOST-04", found=f"{host}:{port}: {error.strerror}", fix=fix) from None
    return door
