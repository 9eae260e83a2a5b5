"""What the hub does when a site fails, is late, lies or is gone, and how a run goes on after it was cut off.

In one process (tests/kit/memory.py); killed processes, cut networks and full disks are in tests/test_faults.py.
"""

from __future__ import annotations

import json
import math
import os

import pytest
from flwr.app import Context, RecordDict

from app import model, wire
from app.adapter import store
from app.errors import ConfigError, HubError
from app.families import sd
from app.hub import attempt, exchange, guard, history, server_app, spool, volume
from tests.kit import tiny
from tests.kit.memory import FakeTime, Federation, spoil_from

# --- a site that fails
# -------------------------------------------------------------------------------------------------


def test_a_refused_site_is_named_with_the_reason_and_the_others_go_on(federation, monkeypatch):
    federation.run_config["min-sites"] = 1
    federation.grid.tamper = spoil_from("1")
    folder = federation.go(monkeypatch)
    (entry,) = federation.history()["rounds"]
    assert entry["refused"] == [
        {"site": "site-2", "reason": "HUB-05  The reply cannot be used: its metrics are missing or impossible."}
    ]
    assert list(entry["sites"]) == ["site-1"]
    assert tiny.equal(
        store.read_adapter(folder / "final"), federation.grid.adapters("1", federation.grid.came)["site-1"]
    )


def test_too_few_valid_replies_end_the_run_with_the_last_good_round_kept(tmp_path, monkeypatch):
    federation = Federation(tmp_path, rounds=3, sample_prompts="")
    federation.grid.tamper = spoil_from("2")
    error = federation.fails(monkeypatch, "HUB-02")
    assert "round 2: 1 of 2 needed. site-2: HUB-05" in str(error)
    history = federation.history()
    assert (history["state"], len(history["rounds"])) == ("failed", 1) and history["error"] == str(error)
    kept = store.read_adapter(federation.adapters / "7" / "round-0001")
    assert model.adapter_hash(kept) == history["rounds"][0]["adapter"]
    assert (
        not (federation.adapters / "7" / "round-0002").exists() and not (federation.adapters / "7" / "final").exists()
    )


def test_a_failed_run_leaves_latest_where_it_was(federation, monkeypatch):
    federation.go(monkeypatch, run_id=6)
    federation.grid.tamper = spoil_from("1")
    federation.fails(monkeypatch, "HUB-02")
    assert os.readlink(federation.adapters / "latest") == "6"


def test_an_adapter_of_nans_does_not_reach_the_global_one(federation, monkeypatch):
    def tamper(site, number, reply):
        if site == "site-1":
            adapter = wire.unpack(reply.content["arrays"])
            adapter[min(adapter)].fill_(math.nan)
            reply.content["arrays"] = wire.pack(adapter)
        return reply

    federation.grid.tamper = tamper
    error = federation.fails(monkeypatch, "HUB-02")
    assert "site-1: ADAPTER-02" in str(error)


def test_a_site_that_trained_from_another_adapter_is_refused(federation, monkeypatch):
    apply = model.apply_adapter
    monkeypatch.setattr(model, "apply_adapter", lambda unet, adapter: apply(unet, tiny.adapter(9)))
    assert "ADAPTER-03" in str(federation.fails(monkeypatch, "HUB-02"))


def test_too_few_sites_in_time_end_the_run(federation, monkeypatch):
    federation.grid.sites.popitem()
    clock = FakeTime()
    clock.of_the_hub(monkeypatch)
    error = federation.fails(monkeypatch, "HUB-01")
    assert str(error) == "HUB-01  Only 1 of 2 sites came within 1 s. Here: site-1."
    assert 1 < clock.now < 4 and federation.history()["state"] == "failed"


def test_a_site_that_was_admitted_and_does_not_come_is_named(federation, monkeypatch, tmp_path):
    for name in ("site-1.pub", "site-2.pub", "site-2.json"):
        (tmp_path / name).write_text('{"images": 5}')
    monkeypatch.setenv("BOUQUET_ADMITTED", str(tmp_path))
    federation.grid.sites.popitem()
    FakeTime().of_the_hub(monkeypatch)
    assert str(federation.fails(monkeypatch, "HUB-01")).endswith("Here: site-1. Missing: site-2.")
    assert json.loads((federation.adapters / "7" / "status.json").read_text())["missing"] == ["site-2"]


def test_a_site_that_comes_late_is_waited_for(federation, monkeypatch):
    federation.run_config["wait-for-sites"] = 60
    late = dict([federation.grid.sites.popitem()])
    clock = FakeTime()
    slept = clock.sleep
    clock.sleep = lambda seconds: slept(seconds) or (clock.now > 30 and federation.grid.sites.update(late))
    clock.of_the_hub(monkeypatch)
    federation.go(monkeypatch)
    assert clock.now > 30 and len(federation.history()["rounds"][0]["sites"]) == 2


def test_a_site_that_never_replies_is_given_up_after_the_rounds_timeout(federation, monkeypatch):
    federation.run_config["min-sites"] = 1
    federation.grid.tamper = lambda site, number, reply: None if (site, number) == ("site-2", "1") else reply
    clock = FakeTime()
    clock.of_the_hub(monkeypatch)
    monkeypatch.setattr(attempt, "POLL", 5.0)
    federation.go(monkeypatch)
    (entry,) = federation.history()["rounds"]
    assert entry["refused"] == [{"site": "site-2", "reason": "HUB-03  No reply within 10 s."}]
    assert clock.now == 10.0


def test_a_message_that_the_superlink_did_not_take_is_a_site_missing(federation, monkeypatch):
    federation.run_config["min-sites"] = 1
    push = federation.grid.push_messages
    federation.grid.push_messages = lambda messages: push(messages[:1]) + [""]
    federation.go(monkeypatch)
    assert federation.history()["rounds"][0]["refused"] == [
        {"site": "site-2", "reason": "HUB-03  No reply because the SuperLink did not take its message."}
    ]


def test_two_sites_of_one_name_are_told_to_the_operator(federation, monkeypatch):
    federation.own["site-2"]["site-name"] = "site-1"
    nodes = federation.grid.get_nodes
    monkeypatch.setattr(federation.grid, "get_nodes", lambda: [setattr(node, "name", "") or node for node in nodes()])
    assert "HUB-07  Another site has the same name." in str(federation.fails(monkeypatch, "HUB-02"))


def test_sites_that_are_gone_for_the_final_evaluation_spoil_nothing(federation, monkeypatch):
    federation.grid.tamper = spoil_from("2")
    folder = federation.go(monkeypatch)
    history = federation.history()
    assert history["state"] == "finished" and history["no_final_evaluation"].startswith("HUB-02")
    assert (folder / "final" / "adapter_model.safetensors").exists() and len(history["validation"]) == 1
    assert os.readlink(federation.adapters / "latest") == "7"


def test_a_site_with_another_base_model_is_refused_by_itself_and_named_in_public(federation, monkeypatch, tmp_path):
    tiny.build(tmp_path / "models" / "tiny", seed=1)
    error = federation.fails(monkeypatch, "HUB-02", models=tmp_path / "models")
    assert str(error).count("MODEL-04 The base model here is not the one the hub uses.") == 2
    assert str(tiny.models()) not in str(error)


# --- a run that cannot begin
# ---------------------------------------------------------------------------------------------


def test_a_wrong_run_config_ends_the_run_before_anything_is_sent_or_written(federation, monkeypatch, capsys):
    federation.run_config["lora-rnk"] = 4
    error = federation.fails(monkeypatch, "CONFIG-01")
    assert isinstance(error, ConfigError) and "did you mean lora-rank?" in capsys.readouterr().out
    assert federation.grid.sent == [] and list(federation.adapters.iterdir()) == []


def test_an_unknown_base_model_ends_the_run_before_anything_is_sent(federation, monkeypatch):
    federation.run_config["base-model"] = "rose"
    federation.fails(monkeypatch, "MODEL-01")
    assert federation.grid.sent == []


@pytest.mark.parametrize("name", ["BOUQUET_ADAPTERS", "BOUQUET_MODELS"])
@pytest.mark.parametrize("value", ["", "/nowhere"])
def test_a_hub_without_its_folders_says_which_one(name, value, federation, monkeypatch):
    tiny.be_the_hub(monkeypatch)
    monkeypatch.setenv("BOUQUET_ADAPTERS", str(federation.adapters))
    monkeypatch.setenv("BOUQUET_MODELS", str(tiny.models()))
    monkeypatch.setenv(name, value)
    with pytest.raises(HubError, match=f"HUB-06.*{name}"):
        server_app.app(federation.grid, Context(7, 1, {}, RecordDict(), federation.run_config))


# --- another try, and how long it is waited for
# -------------------------------------------------------------------------------


def fail_once(site: str, number: str):
    """The site's first reply of a round is spoilt, the second is not."""
    seen = []

    def tamper(who, when, reply):
        if (who, when) == (site, number) and not seen:
            seen.append(reply)
            reply.content["metrics"]["validation-loss"] = math.nan
        return reply

    return tamper


def test_a_round_with_too_few_valid_replies_is_tried_again_and_ends_as_if_nothing_had_been(
    tmp_path, monkeypatch, finished
):
    again = Federation(tmp_path, round_retries=1, sample_prompts="")
    again.grid.tamper = fail_once("site-2", "1")
    folder = again.go(monkeypatch)
    assert [r["site"] for r in again.history()["rounds"][0]["refused"]] == ["site-2"]
    assert [number for site, number, _ in again.grid.sent if site == "site-1"] == ["1", "1", "2", "3"]
    assert tiny.equal(store.read_adapter(folder / "final"), store.read_adapter(finished[1] / "final"))


def test_tries_are_bounded(federation, monkeypatch):
    federation.run_config["round-retries"] = 2
    federation.grid.tamper = spoil_from("1")
    federation.fails(monkeypatch, "HUB-02")
    assert len(federation.grid.sent) == 3 * 2


def stretch(factor: float):
    """A site whose update is `factor` times as long as it was."""

    def tamper(who, when, reply):
        if who == "site-2" and "arrays" in reply.content:
            start = tiny.fresh()
            new = {
                key: start[key] + factor * (value - start[key])
                for key, value in wire.unpack(reply.content["arrays"]).items()
            }
            reply.content["arrays"] = wire.pack(new)
        return reply

    return tamper


def test_an_update_a_million_times_too_long_is_refused_and_the_result_is_the_honest_sites(federation, monkeypatch):
    federation.run_config["min-sites"] = 1
    federation.grid.tamper = stretch(1e6)
    folder = federation.go(monkeypatch)
    (entry,) = federation.history()["rounds"]
    assert [(r["site"], r["reason"].split("  ")[0]) for r in entry["refused"]] == [("site-2", "ADAPTER-04")]
    assert tiny.equal(
        store.read_adapter(folder / "final"), federation.grid.adapters("1", federation.grid.came)["site-1"]
    )


def test_a_rounds_patience_comes_from_the_rounds_before_and_never_exceeds_the_ceiling(federation):
    config = federation.config(round_timeout=1000, round_patience=5.0)
    talk = exchange.Exchange(federation.grid, config, "", federation.root)
    assert talk.deadline() == 1000  # nothing is known yet
    talk.took = [10.0, 100.0, 30.0]
    assert talk.deadline() == 150  # 5 x the median
    talk.took = [2.0]
    assert talk.deadline() == 60  # always a minute
    talk.took = [900.0]
    assert talk.deadline() == 1000
    assert (
        exchange.Exchange(federation.grid, federation.config(round_patience=0.0), "", federation.root).deadline() == 10
    )


def test_while_the_hub_waits_it_says_who_is_missing_and_until_when(federation, monkeypatch):
    seen = []
    pull = federation.grid.pull_messages

    def look(ids):
        seen.append(json.loads((federation.adapters / "7" / "status.json").read_text()))
        return pull(ids[:1])

    federation.grid.pull_messages = look
    federation.go(monkeypatch)
    assert [(s["state"], s["round"], s["replied"], s["missing"]) for s in seen[:2]] == [
        ("waiting", 1, [], ["site-1", "site-2"]),
        ("waiting", 1, ["site-1"], ["site-2"]),
    ]
    assert seen[0]["deadline"] - seen[0]["since"] == pytest.approx(10, abs=0.1)
    last = json.loads((federation.adapters / "7" / "status.json").read_text())
    assert (last["state"], last["adapter"], last["missing"]) == ("finished", "round-0001", [])


def waits(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if " waits  " in line]


def test_a_long_wait_is_told_ever_less_often_with_how_long_each_site_took_the_last_time(tmp_path, monkeypatch, capsys):
    federation = Federation(
        tmp_path, rounds=2, local_steps=1, sample_prompts="", round_patience=0.0, round_timeout=1000
    )
    clock, asked, replies, noted, answer = FakeTime(), {}, {}, [], federation.grid.answer
    seconds = {"1": {"site-1": 15, "site-2": 30}, "2": {"site-1": 170, "site-2": 170}, "3": {"site-2": 25}}

    def once(order, context):  # it is asked for a hundred times
        if id(order) not in replies:
            replies[id(order)] = answer(order, context)
        return replies[id(order)]

    def late(site, number, reply):
        noted.append(json.loads((federation.adapters / "7" / "status.json").read_text()))
        began = asked.setdefault((site, number), clock.now)
        return reply if clock.now - began >= seconds[number].get(site, 0) else None

    federation.grid.answer, federation.grid.tamper = once, late
    clock.of_the_hub(monkeypatch)
    monkeypatch.setattr(attempt, "POLL", 5.0)
    federation.go(monkeypatch)
    assert waits(capsys) == [
        "bouquet: round 1 waits  20 s so far  replied 1  not yet site-2",
        *(
            f"bouquet: round 2 waits  {so_far} s so far  replied 0  not yet site-1 (15 s the last time), site-2 (30 s"
            " the last time)"
            for so_far in (20, 40, 80, 160)
        ),
        "bouquet: last evaluation waits  20 s so far  replied 1  not yet site-2 (170 s the last time)",
    ]
    told = [(status["round"], status["missing"], status["took"]) for status in noted]
    assert told[0] == (1, ["site-1", "site-2"], {})
    assert (2, ["site-1", "site-2"], {"site-1": 15.0, "site-2": 30.0}) in told and (
        3,
        ["site-2"],
        {"site-2": 170.0},
    ) in told


@pytest.mark.parametrize(("timeout", "told"), [(15, []), (1000, [20, 40, 80, 160, 320, 640, 960])])
def test_a_short_round_is_not_told_of_before_it_ends_and_a_long_one_every_five_minutes(
    federation, monkeypatch, capsys, timeout, told
):
    tiny.be_the_hub(monkeypatch, 7)
    federation.grid.pull_messages = lambda ids: []
    FakeTime().of_the_hub(monkeypatch)
    monkeypatch.setattr(attempt, "POLL", 5.0)
    federation.root.joinpath("7").mkdir()
    talk = exchange.Exchange(federation.grid, federation.config(round_timeout=timeout), "", federation.root / "7")
    talk.send("train", 1, tiny.fresh())
    assert waits(capsys) == [
        f"bouquet: round 1 waits  {so_far} s so far  replied 0  not yet site-1, site-2" for so_far in told
    ]


def test_accepted_replies_wait_on_the_volume_and_not_in_memory(federation, monkeypatch):
    seen = []
    weigh = guard.weigh

    def look(replies, *how):
        if any(reply.adapter is None for reply in replies):  # the last evaluation's
            return weigh(replies, *how)
        seen.extend(sorted(replies, key=lambda reply: reply.site))
        assert sorted(file.name for file in (federation.adapters / "7" / ".replies").iterdir()) == sorted(
            f"{r.adapter.file.name}" for r in seen
        )
        sent = federation.grid.adapters("1", federation.grid.came)
        assert all(tiny.equal(dict(reply.adapter), sent[reply.site]) for reply in seen)
        return weigh(replies, *how)

    monkeypatch.setattr(guard, "weigh", look)
    folder = federation.go(monkeypatch)
    assert [type(reply.adapter) for reply in seen] == [spool.Kept] * 2 and not (folder / ".replies").exists()


def test_a_reply_for_which_the_volume_has_no_room_ends_the_run_and_blames_no_site(federation, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "save_file", full)
    assert "could not be kept" in federation.fails(monkeypatch, "HUB-09").found
    assert federation.history()["error"].startswith("HUB-09") and not (federation.adapters / "7" / ".replies").exists()


# --- going on
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision"), [("fedavg", "fp32"), ("fedavgm", "fp32"), ("fedavgm", "fp16")])
def test_a_run_that_was_cut_off_and_taken_up_gives_the_same_adapter_bit_for_bit(
    strategy, precision, tmp_path, monkeypatch
):
    settings = {
        "rounds": 3,
        "strategy": strategy,
        "wire_precision": precision,
        "sample_prompts": "",
    } | ({"server_learning_rate": 0.5} if strategy == "fedavgm" else {})
    whole = Federation(tmp_path / "whole", **settings).go(monkeypatch)
    cut = Federation(tmp_path / "cut", **settings)
    cut.grid.tamper = spoil_from("2")
    cut.fails(monkeypatch, "HUB-02")
    cut.grid.tamper = lambda site, number, reply: reply
    cut.run_config["resume"] = "latest"
    resumed = cut.go(monkeypatch, run_id=8)
    assert [number for site, number, _ in cut.grid.sent[-6:]] == ["2", "2", "3", "3", "4", "4"]
    for folder in ("round-0001", "round-0002", "round-0003", "final"):
        assert tiny.equal(store.read_adapter(resumed / folder), store.read_adapter(whole / folder)), folder
    history, reference = (json.loads((folder / "history.json").read_text()) for folder in (resumed, whole))
    assert history["resumed"] == {"run": "7", "after_round": 1}
    assert [r["adapter"] for r in history["rounds"]] == [r["adapter"] for r in reference["rounds"]]
    assert history["validation"] == reference["validation"]


def test_latest_is_the_run_that_wrote_a_round_last_and_an_id_names_another(tmp_path):
    for number, run in enumerate(("7", "8", "9")):
        if run != "9":  # it wrote nothing
            volume.write_round(tmp_path / run, 1, tiny.adapter(1), tiny.CONFIG, sd.FAMILY, {}, {})
            os.utime(tmp_path / run / "round-0001", (number, number))
        (tmp_path / run).mkdir(exist_ok=True)
    assert volume.find_run(tmp_path, "latest").name == "8"
    assert volume.find_run(tmp_path, "7").name == "7"
    for nothing in ("9", "10"):
        with pytest.raises(HubError, match="HUB-08"):
            volume.find_run(tmp_path, nothing)


def test_a_run_cannot_go_on_with_another_rank_or_another_base(federation, monkeypatch, tmp_path):
    federation.go(monkeypatch)
    federation.run_config |= {"resume": "7", "rounds": 2, "lora-rank": 3}
    assert "another lora-rank" in str(federation.fails(monkeypatch, "HUB-08", run_id=8))
    federation.run_config["lora-rank"] = 2
    tiny.build(tmp_path / "models" / "tiny", seed=1)
    assert "fingerprint" in str(federation.fails(monkeypatch, "HUB-08", run_id=9, models=tmp_path / "models"))


def test_a_run_cannot_go_on_to_fewer_rounds_than_it_has(federation, monkeypatch):
    federation.run_config |= {"rounds": 3}
    federation.go(monkeypatch)
    federation.run_config |= {"resume": "7", "rounds": 2}
    refused = str(federation.fails(monkeypatch, "HUB-08", run_id=8))
    assert "it has trained 3 rounds, and this one is to have 2" in refused
    federation.run_config |= {"rounds": 3}  # nothing is left but the last evaluation
    assert tiny.equal(
        store.read_adapter(federation.go(monkeypatch, run_id=9) / "final"),
        store.read_adapter(federation.adapters / "7/final"),
    )


def test_who_goes_on_with_another_configuration_is_told_what_is_another(federation, monkeypatch, capsys):
    federation.go(monkeypatch)
    federation.run_config |= {"resume": "7", "rounds": 2, "learning-rate": 0.5}
    federation.go(monkeypatch, run_id=8)
    assert "bouquet: from here on with rounds=2 (was 1), learning-rate=0.5 (was 0.01)\n" in capsys.readouterr().out


def test_a_round_that_is_whole_and_not_in_the_history_yet_is_taken_from_its_own_folder(tmp_path, monkeypatch):
    """No room for history.json after round 2 of 3: HUB-09, and the run that goes on has every round and every loss of
    one that was never cut off.
    """
    settings = {"rounds": 3, "sample_prompts": ""}
    whole = Federation(tmp_path / "whole", **settings).go(monkeypatch)
    cut, write = Federation(tmp_path / "cut", **settings), history.write

    def full(path, record):
        if isinstance(record, history.History) and len(record.rounds) == 2:
            raise OSError(28, "No space left on device")
        write(path, record)

    monkeypatch.setattr(history, "write", full)
    assert "history.json could not be written (OSError)" in cut.fails(monkeypatch, "HUB-09").found
    monkeypatch.setattr(history, "write", write)
    assert [entry["round"] for entry in json.loads((cut.adapters / "7/history.json").read_text())["rounds"]] == [1]
    cut.run_config["resume"] = "latest"
    told, reference = (
        json.loads((folder / "history.json").read_text()) for folder in (cut.go(monkeypatch, run_id=8), whole)
    )
    assert [entry["adapter"] for entry in told["rounds"]] == [entry["adapter"] for entry in reference["rounds"]]
    assert told["validation"] == reference["validation"] and len(told["validation"]) == 4


def test_an_adapters_sites_are_all_that_took_part_in_any_round(tmp_path, monkeypatch):
    """Site 2 is refused in the second of two rounds; what it gave in the first is in the adapter."""
    federation = Federation(tmp_path, rounds=2, min_sites=1)
    federation.grid.tamper = spoil_from("2")
    told = history.read_provenance(federation.go(monkeypatch) / "final/provenance.json")
    assert sorted(told.sites) == ["site-1", "site-2"]
    assert told.images == sum(given.images for given in told.sites.values()) > told.sites["site-1"].images


def test_a_volume_without_room_ends_the_run_with_the_last_round_whole(tmp_path, monkeypatch):
    federation = Federation(tmp_path, rounds=2, sample_prompts="")
    monkeypatch.setattr(
        volume.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0 if federation.grid.came else 2**40})
    )
    federation.fails(monkeypatch, "HUB-09")
    history = federation.history()
    assert history["state"] == "failed" and history["error"].startswith("HUB-09")
    assert (
        model.adapter_hash(store.read_adapter(federation.adapters / "7" / "round-0001"))
        == history["rounds"][0]["adapter"]
    )


def test_only_the_newest_rounds_are_kept_when_the_run_says_so(tmp_path, monkeypatch):
    folder = Federation(tmp_path, rounds=3, keep_rounds=2, local_steps=1, sample_prompts="").go(monkeypatch)
    assert (
        volume.written_rounds(folder) == [2, 3]
        and len(json.loads((folder / "history.json").read_text())["rounds"]) == 3
    )


def test_the_hubs_operator_bounds_what_a_site_weighs(federation, monkeypatch, tmp_path):
    (tmp_path / "admitted").mkdir()
    (tmp_path / "admitted" / "site-2.json").write_text('{"images": 3}')
    monkeypatch.setenv("BOUQUET_ADMITTED", str(tmp_path / "admitted"))
    federation.go(monkeypatch)
    sites = federation.history()["rounds"][0]["sites"]
    assert sites["site-1"]["weight"] == sites["site-1"]["num-examples"]
    assert sites["site-2"]["weight"] == 3 < sites["site-2"]["num-examples"]
    assert sites["site-2"]["weight-bound"] == "admitted number" and "weight-bound" not in sites["site-1"]


def test_a_site_that_claims_a_billion_images_decides_no_more_than_its_share_and_the_run_says_so(
    federation, monkeypatch, capsys
):
    def tamper(site, number, reply):
        if site == "site-2":
            reply.content["metrics"].update({"num-examples": 999_999_999, "validation-loss": 1e6, "train-loss": 1e6})
        return reply

    federation.grid.tamper = tamper
    federation.go(monkeypatch)
    told, out = federation.history(), capsys.readouterr().out
    sites = told["rounds"][0]["sites"]
    honest = sites["site-1"]["num-examples"]
    claim = [sites["site-2"][name] for name in ("num-examples", "weight", "weight-bound")]
    assert claim == [999_999_999, 4 * honest, "largest-share"]
    for entry in told["validation"]:  # (1 · own + 4 · 1e6) / 5
        assert entry["weighted"] == pytest.approx(0.2 * entry["sites"]["site-1"] + 0.8e6)
    sentence = (
        f"site-2 says that it has 999,999,999 images and counts for {4 * honest}, since one site may weigh no more"
    )
    assert out.count(f"bouquet: bounded  {sentence}") == 1 and "bouquet hub admit NAME KEY.pub --images N" in out
    provenance = json.loads((federation.adapters / "7/final/provenance.json").read_text())
    assert provenance["sites"]["site-2"] == {"images": 999_999_999, "counted": 4 * honest}
