"""One round at the hub with many sites that answer at once: its seconds and memory, through app/hub/exchange.py and
app/hub/strategy.py.

  python -m benchmarks.speed.hub SITES MEGABYTES        prints JSON; a process of its own, so that its memory is its own

The sites are stubs: each replies with one of a few adapters of that size, packed beforehand. Everything the hub does
is real: it unpacks, checks, hashes, measures, keeps on disk and aggregates every reply.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from app import model, wire
from app.config import RunConfig
from app.families import sd
from app.hub import guard, volume
from app.hub.exchange import Exchange
from app.hub.strategy import Strategy
from benchmarks.speed.watch import memory_mb

LAYERS, RANK = 128, 8  # attention layers of Stable Diffusion 1.5's UNet


class StubGrid(Grid):
    """`count` sites; a reply is made when it is asked for, from a few that are kept packed."""

    set_run = create_message = send_and_receive = None

    def __init__(self, count: int, replies: list) -> None:
        self.nodes, self.replies, self.orders, self.stub = list(range(2, count + 2)), replies, {}, 0.0

    @property
    def run(self) -> None:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def get_nodes(self) -> list:
        return [SimpleNamespace(node_id=node, name=f"site-{node}") for node in self.nodes]

    def push_messages(self, messages) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {message.metadata.dst_node_id}"
            self.orders[message.metadata.message_id] = message
        self.sent = model.adapter_hash(wire.unpack(messages[0].content["arrays"]))
        return list(self.orders)

    def pull_messages(self, message_ids) -> list[Message]:
        start = time.monotonic()
        [order] = [self.orders.pop(name) for name in message_ids]
        node = order.metadata.dst_node_id
        numbers = MetricRecord({"num-examples": 400, "train-loss": 0.1, "validation-loss": 0.1})
        info = ConfigRecord({"site": f"site-{node}", "applied": self.sent, "gpu": ""})
        reply = Message(
            RecordDict({"arrays": self.replies[node % len(self.replies)], "metrics": numbers, "info": info}),
            reply_to=order,
        )
        self.stub += time.monotonic() - start
        return [reply]


def adapter_of_size(megabytes: float, seed: int) -> model.Adapter:
    """float32 tensors in LoRA's two shapes."""
    width = max(1, round(megabytes * 1e6 / (4 * 2 * LAYERS * RANK)))
    draw = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (RANK, width), "lora_B": (width, RANK)}
    return {
        f"layer.{n:03d}.{half}.weight": torch.randn(shape, generator=draw)
        for n in range(LAYERS)
        for half, shape in shapes.items()
    }


def round_at_the_hub(sites: int, megabytes: float) -> dict[str, float]:
    for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 1)):
        setattr(TaskIdentity, name, value)
    config = RunConfig.read({"min-sites": sites, "round-retries": 0})
    replies = [wire.pack(adapter_of_size(megabytes, seed)) for seed in range(1, 5)]
    adapter = adapter_of_size(megabytes, 0)
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
        folder = Path(home) / "7"
        folder.mkdir()
        grid = StubGrid(sites, replies)
        exchange = Exchange(grid, config, "", folder)
        before = memory_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        start = time.monotonic()
        kept, refused = exchange.round(1, adapter)
        new = Strategy(config).aggregate(1, guard.weigh(kept, {}, config.largest_share), adapter)
        seconds = time.monotonic() - start - grid.stub
        spooled = sum(file.stat().st_size for file in (folder / ".replies").iterdir()) / 1e6
        assert len(kept) == sites and not refused
        volume.write_round(folder, 1, new, config, sd.FAMILY, {}, {})
        return {
            "sites": sites,
            "adapter-mb": megabytes,
            "seconds": seconds,
            "more-mb": memory_mb("VmHWM") - before,
            "replies-mb": spooled,
        }


if __name__ == "__main__":
    print(json.dumps(round_at_the_hub(int(sys.argv[1]), float(sys.argv[2]))))
