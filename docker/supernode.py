"""A SuperNode that says whether the hub answers it, and whose process ends when it can do nothing any more.

Flower's SuperNode keeps its HTTP thread when its message loop has died of one bad answer from the hub: the process lives,
answers "healthy", and is offline for ever. Here the end of the loop is the end of the process, whoever started it can start
it again, and every answer of the hub is noted in the file BOUQUET_HEARD for the healthcheck (health.py heard:FILE).
Enters: flower-supernode's own arguments; $NAME in one of them is that environment variable. Leaves: its exit code, 1 when the loop raised.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Any

from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient


def note_answers(file: Path) -> None:
    """Touch `file` after every call that the hub answered well."""
    call = FleetHttpClient._unary_unary

    def noted(self: FleetHttpClient, *args: Any, **kwargs: Any) -> Any:
        answer = call(self, *args, **kwargs)
        file.touch()
        return answer

    FleetHttpClient._unary_unary = noted


if "BOUQUET_HEARD" in os.environ:
    note_answers(Path(os.environ["BOUQUET_HEARD"]))
sys.argv = [os.path.expandvars(argument) for argument in sys.argv]
code: int | str | None = 1
try:
    flower_supernode()
except SystemExit as end:
    code = end.code
except BaseException:  # whatever ended the loop: say it, then end the process
    traceback.print_exc()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code if isinstance(code, int) else 1)
