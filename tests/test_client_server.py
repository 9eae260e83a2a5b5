"""The ServerApp and the ClientApps together in one process: real code at both ends, a Grid that only carries messages.

The same over real processes, TLS and Docker is tested with the deployment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from PIL import Image

from app import metrics, model, wire
from app.adapter import store
from app.errors import BouquetError
from app.site import client_app, privacy, train
from app.site.photos import data
from app.site.privacy import Secret
from tests.kit import tiny
from tests.kit.memory import COUNTS, Federation

# --- federation happens
# ------------------------------------------------------------------------------------------------


def test_round_2_starts_from_round_1s_aggregate_bit_for_bit(finished):
    federation, folder = finished
    first = store.read_adapter(folder / "round-0001")
    received = federation.grid.adapters("2", federation.grid.sent)
    assert sorted(received) == ["site-1", "site-2"]
    assert all(tiny.equal(adapter, first) for adapter in received.values())
    assert not tiny.equal(first, tiny.fresh())


def test_every_site_echoes_the_hash_of_the_adapter_it_was_sent(finished):
    federation, folder = finished
    started = {
        "1": tiny.fresh(),
        "2": store.read_adapter(folder / "round-0001"),
        "3": store.read_adapter(folder / "round-0002"),
    }
    echoed = [(number, reply.content["info"]["applied"]) for _, number, reply in federation.grid.came]
    assert sorted(echoed) == sorted(
        (number, model.adapter_hash(adapter)) for number, adapter in started.items() for _ in COUNTS
    )


def test_the_history_chains_every_round_to_the_one_before(finished):
    federation, folder = finished
    one, two = federation.history()["rounds"]
    assert one["started_from"] == model.adapter_hash(tiny.fresh())
    assert one["adapter"] == two["started_from"] == model.adapter_hash(store.read_adapter(folder / "round-0001"))
    assert two["adapter"] == model.adapter_hash(store.read_adapter(folder / "final"))


@pytest.mark.parametrize("number", [1, 2])
def test_the_aggregate_is_the_mean_of_the_sites_adapters_weighted_by_images(finished, number):
    federation, folder = finished
    replies = federation.grid.adapters(str(number), federation.grid.came)
    images = {
        site: m.content["metrics"]["num-examples"] for site, when, m in federation.grid.came if when == str(number)
    }
    written = store.read_adapter(folder / f"round-000{number}")
    for key, value in written.items():
        parts = (
            replies[site][key].numpy() * np.float32(images[site] / sum(images.values())) for site in sorted(images)
        )
        np.testing.assert_array_equal(value.numpy(), sum(parts))


def test_a_site_weighs_as_many_images_as_it_trained_on(finished):
    federation, _ = finished
    for site, count in COUNTS.items():
        here = train.Site(
            tiny.CONFIG, tiny.models(), federation.root / "data" / site, federation.root / "cache" / site, ""
        )
        assert (
            federation.history()["rounds"][0]["sites"][site]["num-examples"]
            == len(here.train.keys)
            == count - len(here.held_out.keys)
        )


def test_a_sites_adapter_is_what_it_would_train_by_itself_from_the_hubs(finished):
    federation, folder = finished
    here = train.Site(
        tiny.CONFIG, tiny.models(), federation.root / "data" / "site-2", federation.root / "cache" / "site-2", ""
    )
    model.apply_adapter(here.net, store.read_adapter(folder / "round-0001"))
    here.fit(here.privacy.seed(42, "site-2", 2), 2)
    assert tiny.equal(model.adapter_of(here.net), federation.grid.adapters("2", federation.grid.came)["site-2"])


def test_the_two_sites_trained_different_adapters(finished):
    federation, _ = finished
    one, two = federation.grid.adapters("1", federation.grid.came).values()
    assert not tiny.equal(one, two)


def test_one_site_alone_gets_its_own_adapter_back(federation, monkeypatch):
    federation.grid.sites.popitem()
    federation.run_config["min-sites"] = 1
    folder = federation.go(monkeypatch)
    (own,) = federation.grid.adapters("1", federation.grid.came).values()
    assert tiny.equal(store.read_adapter(folder / "final"), own)


def test_the_order_of_replies_does_not_matter_bit_for_bit(finished, tmp_path, monkeypatch):
    again = Federation(tmp_path, sample_prompts="")
    again.grid.turned = True
    folder = again.go(monkeypatch)
    assert [site for site, _, _ in again.grid.came[:2]] == ["site-2", "site-1"]
    assert tiny.equal(store.read_adapter(folder / "final"), store.read_adapter(finished[1] / "final"))


def test_in_half_precision_hub_and_sites_speak_of_the_same_numbers_in_half_the_bytes(finished, tmp_path, monkeypatch):
    federation = Federation(tmp_path, wire_precision="fp16", sample_prompts="")
    folder = federation.go(monkeypatch)
    one, two = federation.history()["rounds"]
    kept = {number: store.read_adapter(folder / f"round-000{number}") for number in (1, 2)}
    assert one["started_from"] == model.adapter_hash(wire.rounded(tiny.fresh(), "fp16"))
    assert two["started_from"] == one["adapter"] == model.adapter_hash(kept[1]) != model.adapter_hash(tiny.fresh())
    assert all(
        model.adapter_hash(adapter) == model.adapter_hash(wire.rounded(adapter, "fp16")) for adapter in kept.values()
    )
    for _, _, message in federation.grid.sent[2:4]:
        assert model.adapter_hash(wire.unpack(message.content["arrays"], "fp16")) == two["started_from"]
    numbers = sum(value.numel() for value in tiny.fresh().values())
    for whole, half in zip(finished[0].grid.came[:4], federation.grid.came[:4], strict=True):
        site, number, reply = half
        accepted = federation.history()["rounds"][int(number) - 1]["adapters"][site]
        assert accepted == model.adapter_hash(wire.unpack(reply.content["arrays"], "fp16"))
        saved = len(whole[2].content["arrays"][wire.NAME].data) - len(reply.content["arrays"][wire.NAME].data)
        assert saved == pytest.approx(2 * numbers, rel=0.02), f"{site}, round {number}"


# --- what the hub keeps and says
# ---------------------------------------------------------------------------------------


def test_the_shared_volume_holds_rounds_final_history_pictures_and_latest(finished):
    federation, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "final",
        "history.json",
        "round-0001",
        "round-0002",
        "samples.png",
        "status.json",
    ]
    assert os.readlink(federation.adapters / "latest") == "7"
    assert federation.history()["state"] == "finished"


def test_validation_is_the_arriving_adapters_loss_at_each_site_and_their_mean_by_images(finished):
    federation, folder = finished
    validation = federation.history()["validation"]
    assert [entry["after_round"] for entry in validation] == [0, 1, 2]
    images = {site: numbers["num-examples"] for site, numbers in federation.history()["rounds"][0]["sites"].items()}
    adapters = [tiny.fresh(), *(store.read_adapter(folder / f"round-000{n}") for n in (1, 2))]
    here = train.Site(
        tiny.CONFIG, tiny.models(), federation.root / "data" / "site-1", federation.root / "cache" / "site-1", ""
    )
    for entry, adapter in zip(validation, adapters, strict=True):
        model.apply_adapter(here.net, adapter)
        assert entry["sites"]["site-1"] == here.evaluate()
        by_hand = sum(entry["sites"][site] * count for site, count in images.items()) / sum(images.values())
        assert entry["weighted"] == pytest.approx(by_hand)
    assert len({entry["weighted"] for entry in validation}) == 3


def test_the_final_evaluation_trains_nothing(finished):
    federation, _ = finished
    last = [reply for _, number, reply in federation.grid.came if number == "3"]
    assert len(last) == 2 and all("arrays" not in reply.content for reply in last)
    assert all("seconds-train" not in reply.content["metrics"] for reply in last)


def test_provenance_says_what_the_adapter_was_made_of(finished):
    federation, folder = finished
    told = json.loads((folder / "final" / "provenance.json").read_text())
    assert told["run"] == "7" and told["rounds"] == 2
    assert told["adapter_sha256"] == model.adapter_hash(store.read_adapter(folder / "final"))
    assert told["base"] == {"name": "tiny", "fingerprint": model.fingerprint(tiny.base())["base"]}
    assert told["images"] == sum(site["images"] for site in told["sites"].values()) and set(told["sites"]) == set(
        COUNTS
    )
    assert told["config"]["lora_rank"] == 2 and "torch" in told["versions"]


def test_the_pictures_have_a_row_for_the_base_and_each_round(finished):
    _, folder = finished
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.height == 10 + 2 * 17 + 3 * 134


def test_no_prompts_draw_no_pictures(federation, monkeypatch):
    assert not (federation.go(monkeypatch) / "samples.png").exists()


def test_a_person_can_follow_the_run_line_by_line(federation, monkeypatch, capsys):
    folder = federation.go(monkeypatch)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if re.match(r"bouquet: (round|validation|finished)", line)
    ]
    number = r"\d+\.\d{4}"
    images = federation.history()["rounds"][0]["sites"]
    total = sum(site["num-examples"] for site in images.values())
    assert re.fullmatch(
        rf"bouquet: round 1/1  train {number}  validation {number}  sites 2  images {total}  \d+ s  ETA 0 s", lines[0]
    )
    assert re.fullmatch(rf"bouquet: validation {number} -> {number} over 1 rounds", lines[1])
    assert re.fullmatch(rf"bouquet: finished  adapter {re.escape(str(folder / 'final'))}  seconds \d+", lines[2])


def test_sites_that_have_different_things_to_report_are_averaged_all_the_same(federation, monkeypatch):
    path = federation.root / "data" / "site-1" / "0001.png"
    path.write_bytes(path.read_bytes()[:400])
    privacy.declare_public(path.parent, data.scan(path.parent).photos)
    federation.go(monkeypatch)
    sites = federation.history()["rounds"][0]["sites"]
    assert sites["site-1"]["photos-undecodable"] == 1 and "photos-undecodable" not in sites["site-2"]


# --- what leaves a site
# ------------------------------------------------------------------------------------------------


def test_an_unexpected_failure_leaves_as_its_type_alone_and_stays_whole_in_the_sites_log(
    federation, monkeypatch, capsys
):
    def fail(self, seed, number):
        raise RuntimeError("/data/site-1/anna.png: a red poppy at Anna's")

    monkeypatch.setattr(train.Site, "fit", fail)
    error = federation.fails(monkeypatch, "HUB-02")
    assert "SITE-99 The site failed unexpectedly (RuntimeError)" in str(error)
    assert not re.search("anna|poppy|/data", str(error) + json.dumps(federation.history()), re.IGNORECASE)
    assert "anna.png" in capsys.readouterr().err


def test_an_empty_site_says_so_without_its_path_and_with_it_in_its_own_log(federation, monkeypatch, capsys):
    data = federation.root / "data" / "site-1"
    shutil.rmtree(data)
    data.mkdir()
    error = federation.fails(monkeypatch, "HUB-02")
    assert "site-1: HUB-04  The site could not take part: SITE-01 No training images." in str(error)
    assert str(federation.root) not in str(error)
    assert str(data) in capsys.readouterr().out


def test_nothing_that_a_site_sends_names_a_file_a_caption_or_a_path(finished):
    federation, _ = finished
    allowed = re.compile(
        r"num-examples|(train|validation)-loss|seconds-(start|encode|load|evaluate|train)|gpu-(peak-mib|utilisation|joules)"
    )
    for site, _, reply in federation.grid.came:
        assert set(reply.content) <= {"arrays", "metrics", "info"}
        assert all(allowed.fullmatch(name) for name in reply.content["metrics"])
        # the hub keeps all that a site sends
        assert metrics.sane(reply.content["metrics"]) == (dict(reply.content["metrics"]), 0)
        assert set(reply.content["info"]) == {"site", "applied", "gpu"} and reply.content["info"]["site"] == site
        assert not reply.content.config_records["info"]["applied"].strip("0123456789abcdef")


def test_the_hub_sends_the_adapter_the_round_and_the_fingerprint_and_nothing_else(finished):
    federation, _ = finished
    for _, number, order in federation.grid.sent:
        assert set(order.content) == {"arrays", "config"}
        assert dict(order.content["config"]) == {
            "round": int(number),
            "base-fingerprint": model.fingerprint(tiny.base())["base"],
        }


# --- where things are
# --------------------------------------------------------------------------------------------------


def context(**node_config) -> Context:
    return Context(7, 101, {key.replace("_", "-"): value for key, value in node_config.items()}, RecordDict(), {})


def test_in_deployment_the_node_config_says_where_everything_is():
    own = context(site_name="garden", data_path="/data", models_path="/models", cache_path="/cache")
    assert client_app.places(own) == ("garden", Path("/data"), Path("/models"), Path("/cache"), Secret.MADE)


def test_in_a_simulation_the_partition_says_it(monkeypatch):
    for name in ("DATA", "MODELS", "CACHE"):
        monkeypatch.setenv(f"BOUQUET_{name}", f"/{name.lower()}")
    own = context(partition_id=1, num_partitions=2)
    assert client_app.places(own) == (
        "site-2",
        Path("/data/site-2"),
        Path("/models"),
        Path("/cache/site-2"),
        Secret.NONE,
    )


def test_a_runs_config_cannot_say_where_a_sites_data_are(monkeypatch):
    monkeypatch.delenv("BOUQUET_DATA", raising=False)
    own = Context(
        7, 101, {}, RecordDict(), {"data-path": "/etc", "site-name": "x", "models-path": "/", "cache-path": "/"}
    )
    with pytest.raises(BouquetError, match="SITE-12"):
        client_app.places(own)


def test_half_a_node_config_is_refused_with_the_whole_one(monkeypatch):
    monkeypatch.delenv("BOUQUET_DATA", raising=False)
    with pytest.raises(BouquetError, match="SITE-12") as caught:
        client_app.places(context(data_path="/data", site_name="garden"))
    assert "data-path, site-name" in caught.value.found and "cache-path" in caught.value.fix


def test_the_same_federation_runs_by_partition_as_in_a_simulation(finished, tmp_path, monkeypatch):
    again = Federation(tmp_path, sample_prompts="")
    for number, (node, (name, _)) in enumerate(again.grid.sites.items()):
        again.grid.sites[node] = (name, {"partition-id": number, "num-partitions": 2})
    for name, path in {"DATA": tmp_path / "data", "CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(f"BOUQUET_{name}", str(path))
    assert tiny.equal(store.read_adapter(again.go(monkeypatch) / "final"), store.read_adapter(finished[1] / "final"))
