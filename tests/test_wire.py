"""The adapter on the wire: what arrives is what was sent, in few objects, and nothing else is taken for it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from app import model, wire
from app.errors import AdapterError
from bouquet import ROOT
from tests.kit import tiny


def test_an_adapter_arrives_bit_for_bit():
    sent = tiny.adapter(1)
    got = wire.unpack(wire.pack(sent))
    assert model.adapter_hash(got) == model.adapter_hash(sent)


def test_a_message_has_one_array_however_many_tensors_the_adapter_has():
    adapter = tiny.adapter(1)
    assert len(adapter) > 100
    assert len(get_all_nested_objects(wire.pack(adapter))) == 3  # the record, its one array, the array's one chunk


def test_the_wire_carries_the_tensors_and_a_header_of_names():
    adapter = tiny.adapter(1)
    numbers = sum(value.numel() for value in adapter.values())
    header = wire.pack(adapter)[wire.NAME].numpy().nbytes - 4 * numbers
    assert 0 < header < 200 * len(adapter)


def test_the_same_adapter_gives_the_same_bytes_so_that_it_is_stored_once():
    first, again = wire.pack(tiny.adapter(1)), wire.pack(tiny.adapter(1))
    assert first.object_id == again.object_id != wire.pack(tiny.adapter(2)).object_id


@pytest.mark.parametrize(
    "record",
    [
        None,
        ArrayRecord(),
        ConfigRecord(),
        MetricRecord(),
        ArrayRecord({"other": Array(np.zeros(3))}),
        ArrayRecord({wire.NAME: Array(np.zeros(3))}),
    ],
    ids=["nothing", "empty", "config", "metrics", "another name", "no safetensors"],
)
def test_what_holds_no_adapter_gives_no_tensors(record):
    assert wire.unpack(record) == {}


def test_a_header_that_promises_more_bytes_than_came_gives_no_tensors():
    whole = wire.pack({"a": torch.ones(4)})[wire.NAME].numpy()
    assert wire.unpack(ArrayRecord({wire.NAME: Array(whole[:-4].copy())})) == {}


def test_in_half_precision_what_arrives_is_the_rounded_adapter_in_half_the_bytes():
    adapter = tiny.adapter(1)
    numbers, agreed = sum(value.numel() for value in adapter.values()), wire.rounded(adapter, "fp16")
    packed = wire.pack(agreed, "fp16")
    arrived = wire.unpack(packed, "fp16")
    assert model.adapter_hash(arrived) == model.adapter_hash(agreed) != model.adapter_hash(adapter)
    assert wire.pack(adapter)[wire.NAME].numpy().nbytes - packed[wire.NAME].numpy().nbytes == pytest.approx(
        2 * numbers, rel=0.01
    )


def test_rounding_keeps_eleven_bits_and_an_overflow_shows():
    got = wire.rounded({"a": torch.tensor([1 + 2**-10, 1 + 2**-12, 0.1, 65505.0, 65520.0])}, "fp16")["a"]
    assert got.dtype == torch.float32 and got.tolist() == [1.0009765625, 1.0, 0.0999755859375, 65504.0, float("inf")]


def test_in_full_precision_nothing_is_rounded():
    adapter = tiny.adapter(1)
    assert wire.rounded(adapter, "fp32") is adapter


@pytest.mark.parametrize(("sent", "agreed"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_another_precision_than_was_agreed_on_fits_no_model(sent, agreed):
    adapter = tiny.adapter(1)
    with pytest.raises(AdapterError) as caught:
        model.check_adapter(wire.unpack(wire.pack(adapter, sent), agreed), adapter)
    assert caught.value.code == "ADAPTER-01" and f"{len(adapter)} of another shape or type" in caught.value.found


# --- a large adapter, in Flower's pieces ------------------------------------------------------------------------------

MIB = 2**20


def test_45_million_numbers_are_18_pieces_and_none_is_larger_than_the_gateway_lets_pass():
    """In fp16 90,000,000 bytes and a header of 80: 17 pieces of 5 MiB, and the rest."""
    record = wire.pack({"layer.lora_A.weight": torch.randn(45_000_000)}, "fp16")
    pieces = get_all_nested_objects(record)
    sizes = sorted(len(piece.deflate()) for piece in pieces.values())
    assert len(record[wire.NAME].data) // (5 * MIB) == 17
    assert len(sizes) == 2 + 18  # the record and its array beside them
    assert sizes[-17:] == [sizes[-1]] * 17 and 5 * MIB < sizes[-1] < 5 * MIB + 100
    message = PushObjectRequest(
        node=Node(node_id=2**62), run_id=2**62, object_id="a" * 64, object_content=b"x" * sizes[-1]
    )
    allowed = re.search(r"client_max_body_size (\d+)m;", (ROOT / "docker/gateway.conf").read_text())
    assert allowed and message.ByteSize() < int(allowed[1]) * MIB


@pytest.mark.parametrize("lost", [False, True])
def test_an_adapter_in_many_pieces_is_put_together_bit_for_bit_and_without_one_of_them_not_at_all(monkeypatch, lost):
    """1000 bytes a piece in place of 5 MiB."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1000)
    adapter = tiny.adapter(1)
    record = wire.pack(adapter)
    pieces = {name: piece.deflate() for name, piece in get_all_nested_objects(record).items()}
    assert len(pieces) == 2 + -(-len(record[wire.NAME].data) // 1000) > 10
    if lost:
        pieces.pop(sorted(name for name, piece in pieces.items() if len(piece) > 1000)[0])
        with pytest.raises(KeyError):
            inflate_object_from_contents(record.object_id, pieces)
        return
    arrived = inflate_object_from_contents(record.object_id, pieces)
    assert tiny.equal(wire.unpack(arrived), adapter)
