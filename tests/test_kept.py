"""What a site keeps from a round to the next where one process takes all messages of a run: everything that costs,
nothing that was learned.
"""

from __future__ import annotations

import builtins
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from flwr.app import ConfigRecord, Context, Message, RecordDict

from app import model, wire
from app.site import client_app, diffusion, journal, train
from app.site.photos import data
from tests.kit import tiny

ROUND = {"sample-prompts": "", "local-steps": 2, "rounds": 3}


@pytest.fixture
def keep(monkeypatch):
    """As in a worker of superexec.py."""
    monkeypatch.setenv("BOUQUET_KEEP", "1")
    tiny.be_the_hub(monkeypatch)
    yield
    client_app.kept.clear()


@pytest.fixture
def own(tmp_path) -> dict[str, str]:
    """A site's node config."""
    folder = tiny.site(tmp_path / "data", count=8)
    return {
        "site-name": "site-1",
        "data-path": str(folder),
        "models-path": str(tiny.models()),
        "cache-path": str(tmp_path / "cache"),
    }


def send(
    own: dict[str, str], number: int, adapter: model.Adapter, kind: str = "train", run: int = 7, **config
) -> Message:
    """The site's reply to one message of the hub."""
    order = RecordDict(
        {
            "arrays": wire.pack(adapter),
            "config": ConfigRecord({"round": number, "base-fingerprint": model.fingerprint(tiny.base())["base"]}),
        }
    )
    message = Message(order, dst_node_id=101, message_type=kind, group_id=str(number))
    message.metadata.__dict__["_message_id"] = f"message {number}"
    return client_app.app(message, Context(run, 101, own, RecordDict(), tiny.RUN | ROUND | config))


def adapter_in(reply: Message) -> model.Adapter:
    return wire.unpack(reply.content["arrays"])


def numbers(reply: Message) -> dict[str, float]:
    return {key: value for key, value in reply.content["metrics"].items() if not key.startswith("seconds-")}


@pytest.fixture
def costs(monkeypatch) -> list[str]:
    """One entry for every model that is loaded, every photo that is read, every process that is started; none for the
    journal, which is read for each message: it knows what has been promised.
    """
    seen: list[str] = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*args, **kwargs):
            if not (args and isinstance(args[0], Path) and args[0].name == journal.FILE):
                seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for kind in (
        diffusers.UNet2DConditionModel,
        diffusers.AutoencoderKL,
        diffusers.DDPMScheduler,
        transformers.CLIPTextModel,
        transformers.CLIPTokenizer,
    ):
        watch(kind, "from_pretrained")
    for owner, name in ((data, "scan"), (subprocess, "Popen"), (os, "fork"), (os, "posix_spawn"), (Path, "read_bytes")):
        watch(owner, name)
    return seen


def test_a_second_message_of_a_run_loads_nothing_starts_no_process_and_imports_nothing(keep, own, costs):
    first = send(own, 1, tiny.fresh())
    assert {"from_pretrained", "scan"} <= set(costs)
    costs.clear()
    modules = set(sys.modules)
    second = send(own, 2, adapter_in(first))
    assert costs == [] and set(sys.modules) == modules
    assert (
        not second.has_error() and second.content["metrics"]["num-examples"] == first.content["metrics"]["num-examples"]
    )


def test_a_round_in_a_kept_process_is_bit_for_bit_the_round_of_a_fresh_one(keep, own, monkeypatch):
    adapter, kept = tiny.fresh(), []
    for number in (1, 2, 3):
        kept.append(send(own, number, adapter))
        adapter = tiny.adapter(number)  # what another site made of it: unlike anything that this one has learned
    monkeypatch.delenv("BOUQUET_KEEP")
    client_app.kept.clear()
    adapter = tiny.fresh()
    for number, before in enumerate(kept, start=1):
        fresh = send(own, number, adapter)
        assert tiny.equal(adapter_in(fresh), adapter_in(before)) and numbers(fresh) == numbers(before)
        adapter = tiny.adapter(number)
    assert not client_app.kept


def test_the_last_message_of_a_run_leaves_nothing_behind(keep, own):
    trained = adapter_in(send(own, 1, tiny.fresh()))
    assert len(client_app.kept) == 1
    assert not send(own, 2, trained, kind="evaluate").has_error()
    assert not client_app.kept


def test_a_message_that_fails_leaves_nothing_behind(keep, own):
    send(own, 1, tiny.fresh())
    failed = send(own, 2, {"another": torch.zeros(1)})
    assert failed.has_error() and failed.error.reason.startswith("ADAPTER-01")
    assert not client_app.kept


@pytest.mark.parametrize("change", [{"run": 8}, {"local-steps": 1}])
def test_another_run_or_another_config_starts_from_nothing(keep, own, costs, change):
    send(own, 1, tiny.fresh())
    costs.clear()
    assert not send(own, 1, tiny.fresh(), **change).has_error()
    assert {"from_pretrained", "scan"} <= set(costs) and len(client_app.kept) == 1


def test_a_photo_that_comes_or_goes_between_two_rounds_is_noticed_and_the_model_stays(keep, own, costs):
    first = send(own, 1, tiny.fresh())
    (Path(own["data-path"]) / "0003.png").unlink()
    costs.clear()
    second = send(own, 2, tiny.fresh())
    assert "scan" in costs and "from_pretrained" not in costs
    assert second.content["metrics"]["photos-absent"] == 1 and "photos-absent" not in first.content["metrics"]


@pytest.mark.parametrize("change", ["same bytes, another time", "other bytes, same size and time", "caption"])
def test_the_stamp_of_a_folder_changes_with_every_change_of_a_file(own, change):
    folder = Path(own["data-path"])
    photo, before = folder / "0001.png", data.stamp(folder)
    assert data.stamp(folder) == before
    status, content = photo.stat(), photo.read_bytes()
    match change:
        case "same bytes, another time":
            os.utime(photo, ns=(1, 1))
        case "other bytes, same size and time":
            photo.write_bytes(content[:-1] + b"x")
            os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "caption":
            (folder / "caption.txt").write_text("a photo")
    assert data.stamp(folder) != before


def test_a_stamp_reads_no_file(own, monkeypatch):
    monkeypatch.setattr(builtins, "open", None)
    monkeypatch.setattr(Path, "open", None)
    assert len(data.stamp(Path(own["data-path"]))) == 64


def test_seconds_are_counted_from_when_the_message_came(keep, own, monkeypatch):
    import time

    monkeypatch.setenv("BOUQUET_BEGAN", str(time.monotonic() - 5))
    assert 5 < send(own, 1, tiny.fresh()).content["metrics"]["seconds-start"] < 60


def test_a_site_that_wants_gradient_checkpointing_gets_it_and_the_same_adapter(keep, own, monkeypatch):
    plain = adapter_in(send(own, 1, tiny.fresh()))
    monkeypatch.setenv("SITE_CHECKPOINTING", "1")
    saving = adapter_in(send(own, 1, tiny.fresh()))
    [site] = client_app.kept.values()
    assert site.net.is_gradient_checkpointing and tiny.equal(plain, saving)


def test_a_site_whose_wish_cannot_be_read_takes_no_part(own, monkeypatch):
    tiny.be_the_hub(monkeypatch)
    monkeypatch.setenv("SITE_CHECKPOINTING", "perhaps")
    assert send(own, 1, tiny.fresh()).error.reason.startswith("CHECK-09")


# --- out of memory
# -----------------------------------------------------------------------------------------------------


def test_what_filled_the_memory_is_gone_when_the_step_is_tried_again_with_half_the_images(own, monkeypatch):
    """An error holds the frames that it came through, and those hold what was computed: on a GPU the second try would
    fail of the first one's memory.
    """
    held, alive, loss = [], [], diffusion.noise_loss

    def noise_loss(unet, scheduler, latents, *rest, **named):
        if len(latents) > 2:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(held[0]() is not None)
        return loss(unet, scheduler, latents, *rest, **named)

    monkeypatch.setattr(diffusion, "noise_loss", noise_loss)
    paths = [Path(own[key]) for key in ("models-path", "data-path", "cache-path")]
    site = train.Site(tiny.config(batch_size=4), *paths, "")
    gc.disable()  # no help from the collector
    try:
        site.fit(1)
    finally:
        gc.enable()
    assert alive and not any(alive)
    site.fit(2)
    assert len(held) == 1  # the next round begins with what fits
