"""The adapter on the wire: what arrives is what was sent, in few objects, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from app import model, wire
from app.errors import AdapterError
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
