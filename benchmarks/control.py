"""Runs started and judged over a hub's Control API: it costs nothing, where `flwr` would cost a process each time.

Enters: a door to the API and the output volume, which the class that takes this one in has. Leaves: states, and what a
run wrote there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    ListRunsRequest,
    ListRunsResponse,
    StartRunResponse,
)

from app import bundle
from benchmarks.hostile import CONTROL, Door
from bouquet import ROOT
from bouquet.hub.control import order


class Control:
    door: Door  # the Control API's address
    adapters: Path  # the output volume
    app = ROOT  # the checkout that runs are started from

    def online(self) -> int:
        """Sites that are online; -1 while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-nodes", ListNodesRequest())
        if answer.status != 200:
            return -1
        return sum(node.status == "online" for node in ListNodesResponse.FromString(answer.body).nodes_info)

    def start_run(self, config: Mapping[str, Any], app: Path | None = None) -> str:
        """What `flwr run` sends; the run's id."""
        answer = self.door.call(CONTROL + "start-run", order(bundle.build(app or self.app), config))
        assert answer.status == 200, answer
        return str(StartRunResponse.FromString(answer.body).run_id)

    def state(self, run: str) -> str:
        """As `flwr ls` says it; '' while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-runs", ListRunsRequest(run_id=int(run)))
        if answer.status != 200:
            return ""
        status = ListRunsResponse.FromString(answer.body).run_dict[int(run)].status
        return f"{status.status}:{status.sub_status}".rstrip(":")

    def said(self, run: str) -> dict[str, Any]:
        """The run's status.json; {} while there is none."""
        return read(self.adapters / run / "status.json")


def read(file: Path) -> dict[str, Any]:
    """A JSON file; {} where there is none, or half of one."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
