"""A hub and two sites in one process: the real ServerApp and ClientApps, and a Grid that only carries messages.

A site keeps its model from a message of the run to the next, as the process that takes them all does in a deployment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from app import model, wire
from app.config import RunConfig
from app.errors import BouquetError
from app.hub import attempt, exchange, server_app, sites
from app.site import client_app
from tests.kit import tiny

COUNTS = {"site-1": 8, "site-2": 12}  # pictures at each site


class MemoryGrid(Grid):
    """Nodes by id, each with its own node config; a reply is made when it is asked for, and may be tampered with."""

    def __init__(self, sites: dict[str, dict], run_config: dict) -> None:
        self.sites = {100 + n: (name, own) for n, (name, own) in enumerate(sites.items(), start=1)}
        self.run_config, self.run_id = run_config, 7
        self.orders: dict[str, Message] = {}
        self.sent: list[tuple[str, str, Message]] = []  # (site, round, the hub's message)
        self.came: list[tuple[str, str, Message]] = []  # (site, round, the site's reply)
        self.answer = client_app.app
        self.kept: dict[str, dict] = {}  # what each site's process has of the round before: here they are one process
        self.turned = False  # replies in the other order
        self.tamper: Callable[[str, str, Message], Message | None] = lambda site, number, reply: reply

    set_run = create_message = send_and_receive = None

    @property
    def run(self):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.sites)

    def get_nodes(self):
        return [SimpleNamespace(node_id=node, name=name) for node, (name, _) in self.sites.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(f"message {len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.orders[ids[-1]] = message
            self.sent.append((self.sites[message.metadata.dst_node_id][0], message.metadata.group_id, message))
        return ids

    def pull_messages(self, message_ids):
        for message_id in message_ids:
            order = self.orders[message_id]
            if self.turned and order.metadata.dst_node_id != max(self.sites) and len(self.came) % len(self.sites) == 0:
                continue  # the last site answers first
            node, number = order.metadata.dst_node_id, order.metadata.group_id
            site, own = self.sites[node]
            client_app.kept.clear()
            client_app.kept.update(self.kept.pop(site, {}))
            reply = self.answer(order, Context(self.run_id, node, own, RecordDict(), self.run_config))
            self.kept[site] = dict(client_app.kept)
            client_app.kept.clear()
            if (reply := self.tamper(site, number, reply)) is not None:
                self.came.append((site, number, reply))
                yield reply

    def adapters(self, number: str, which: list) -> dict[str, model.Adapter]:
        return {s: wire.unpack(m.content["arrays"]) for s, n, m in which if n == number and "arrays" in m.content}


class Federation:
    """Two sites and a hub on one disk."""

    def __init__(
        self,
        root: Path,
        public: bool = True,
        counts: Mapping[str, int] = COUNTS,
        models: Path | None = None,
        **run_config,
    ) -> None:
        self.models = models or tiny.models()
        self.root, self.run_config = root, tiny.RUN | {k.replace("_", "-"): v for k, v in run_config.items()}
        self.adapters = root / "adapters"
        self.adapters.mkdir(parents=True)
        self.own = {}
        for seed, (name, count) in enumerate(counts.items()):
            folder = tiny.site(root / "data" / name, count, seed, public)
            paths = {"data-path": folder, "models-path": self.models, "cache-path": root / "cache" / name}
            self.own[name] = {"site-name": name} | {key: str(path) for key, path in paths.items()}
        self.grid = MemoryGrid(self.own, self.run_config)

    def go(self, monkeypatch, run_id: int = 7, models: Path | None = None) -> Path:
        """The whole run; returns its folder."""
        tiny.be_the_hub(monkeypatch, run_id)
        monkeypatch.setenv("BOUQUET_ADAPTERS", str(self.adapters))
        monkeypatch.setenv("BOUQUET_MODELS", str(models or self.models))
        monkeypatch.setenv("BOUQUET_KEEP", "1")  # as in a worker of superexec.py
        server_app.app(self.grid, Context(run_id, 1, {}, RecordDict(), self.run_config))
        return self.adapters / str(run_id)

    def fails(self, monkeypatch, code: str, **how) -> BouquetError:
        with pytest.raises(BouquetError) as caught:
            self.go(monkeypatch, **how)
        assert caught.value.code == code
        return caught.value

    def config(self, **changes) -> RunConfig:
        return tiny.config(**changes)

    def history(self) -> dict:
        return json.loads((self.adapters / "7" / "history.json").read_text())


def spoil_from(
    number: str, site: str = "site-2", value: float = float("nan")
) -> Callable[[str, str, Message], Message]:
    """A site whose validation loss is no number from some round on."""

    def tamper(who: str, when: str, reply: Message) -> Message:
        if who == site and when >= number:
            reply.content["metrics"]["validation-loss"] = value
        return reply

    return tamper


class FakeTime:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def of_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> FakeTime:
        """From now on the hub goes by this clock."""
        for module in (exchange, attempt, sites):
            monkeypatch.setattr(module, "time", self)
        return self

    monotonic = time
    strftime, gmtime = staticmethod(lambda *_: "then"), staticmethod(lambda *_: None)
