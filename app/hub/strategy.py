"""From the valid replies of a round to the next global adapter, by one of Flower's own strategies, or by products.py.

Enters: replies that guard.py has accepted and weighed. Leaves: the adapter; and the server optimiser's state as
tensors, so that a run that is taken up again goes on exactly as it would have.
Sources: FedAvg, McMahan et al. 2017, arXiv:1602.05629; FedAvgM, Hsu et al. 2019, arXiv:1909.06335; FedAdam, Reddi et
al. 2021, arXiv:2003.00295; median and trimmed mean, Yin et al. 2018, arXiv:1803.01498; Krum, Blanchard et al. 2017,
arXiv:1703.02757.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from app import lora
from app.config import RunConfig
from app.hub import products, spool
from app.hub.guard import Reply
from app.model import Adapter

KEPT = ("momentum_vector", "m_t", "v_t")  # what Flower's server optimisers remember between rounds


@dataclass(frozen=True)
class _Valid:
    """What Flower's strategies ask of a reply's message."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def _choose(config: RunConfig) -> flower.FedAvg:
    match config.strategy:
        case "fedavg" | "alternate" | "svd":  # the last takes no mean of Flower's
            return flower.FedAvg()
        case "fedavgm":
            return flower.FedAvgM(
                server_learning_rate=config.server_learning_rate, server_momentum=config.server_momentum
            )
        case "fedadam":
            return flower.FedAdam(eta=config.server_learning_rate, beta_1=config.server_momentum)
        case "median":
            return flower.FedMedian()
        case "trimmed-mean":
            return flower.FedTrimmedAvg(beta=config.trimmed_share)
        case "krum":
            return flower.Krum(num_malicious_nodes=config.krum_malicious)
    raise AssertionError(config.strategy)


def _ordered(adapter: Adapter) -> Adapter:
    """In key order: FedAvgM takes tensors by position, and a file's order is not that of a fresh adapter."""
    return {key: adapter[key] for key in sorted(adapter)}


def _call(strategy: flower.FedAvg, number: int, replies: Sequence[Reply], keys: Iterable[str]) -> Adapter:
    """What Flower makes of these tensors of the replies."""
    messages = [
        _Valid(
            RecordDict(
                {
                    "arrays": ArrayRecord(torch_state_dict=spool.some(reply.trained, sorted(keys))),
                    "metrics": MetricRecord({"num-examples": reply.images}),
                }
            )
        )
        for reply in replies
    ]
    arrays, _ = strategy.aggregate_train(number, cast(list[Message], messages))
    assert arrays is not None  # guard.py lets no round through without a reply
    return {key: value.float() for key, value in arrays.to_torch_state_dict().items()}


def _call_by_parts(strategy: flower.FedAvg, number: int, replies: Sequence[Reply], adapter: Adapter) -> Adapter:
    """The same, a few tensors at a time: these strategies treat every number by itself."""
    new: Adapter = {}
    part: list[str] = []
    for key in sorted(adapter):
        if part and len(replies) * sum(adapter[k].nbytes for k in [*part, key]) > spool.MOST:
            new |= _call(strategy, number, replies, part)
            part = []
        part.append(key)
    return new | _call(strategy, number, replies, part)


class Strategy:
    """One run's strategy: Flower's, with its state in and out."""

    def __init__(self, config: RunConfig, state: dict[str, torch.Tensor] | None = None) -> None:
        self.config = config
        self.flower: Any = _choose(config)  # its parts differ from strategy to strategy
        state = state or {}
        for name in KEPT:
            own = {key.partition("/")[2]: state[key].numpy() for key in sorted(state) if key.startswith(f"{name}/")}
            if own:
                setattr(self.flower, name, list(own.values()) if name == "momentum_vector" else own)

    def aggregate(self, number: int, replies: Iterable[Reply], adapter: Adapter) -> Adapter:
        """The global adapter after round `number`, which started from `adapter`. In the order of the sites' names."""
        if self.config.strategy == "svd":
            return products.folded(replies, adapter)
        if half := lora.half(self.config, number):  # a mean of the other, alike everywhere, would round it
            trained, replies = lora.part(adapter, half), sorted(replies, key=lambda reply: reply.site)
            return lora.filled(_call_by_parts(self.flower, number, replies, trained), adapter)
        if hasattr(self.flower, "current_arrays"):  # FedAdam wants arrays, FedAvgM a record
            record = ArrayRecord(torch_state_dict=_ordered(adapter))
            self.flower.current_arrays = (
                {k: v.numpy() for k, v in adapter.items()} if hasattr(self.flower, "m_t") else record
            )
        replies = sorted(replies, key=lambda reply: reply.site)
        if isinstance(self.flower, flower.Krum):  # it compares whole updates
            return _call(self.flower, number, replies, adapter)
        if hasattr(self.flower, "current_arrays"):  # they take the mean and move the global adapter by it
            mean = _call_by_parts(flower.FedAvg(), number, replies, adapter)
            return _call(
                self.flower, number, [Reply("mean", mean, sum(reply.images for reply in replies), {})], adapter
            )
        return _call_by_parts(self.flower, number, replies, adapter)

    def state(self) -> dict[str, torch.Tensor]:
        """The server optimiser's memory by name; {} for a strategy that has none."""
        kept: dict[str, torch.Tensor] = {}
        for name in KEPT:
            value = getattr(self.flower, name, None)
            items = value.items() if isinstance(value, dict) else ((f"{i:05d}", v) for i, v in enumerate(value or ()))
            kept |= {f"{name}/{key}": torch.as_tensor(array).contiguous().clone() for key, array in items}
        return kept
