"""The moving average over the rounds: numbers by hand, on the volume, taken up again, and what a run leaves."""

from __future__ import annotations

import json

import pytest
import torch

from app.adapter import store
from app.hub import ema, volume
from benchmarks import check
from tests.kit import tiny
from tests.kit.memory import Federation


def test_three_rounds_by_hand():
    """1; 0.75·1 + 0.25·5 = 2; 0.75·2 + 0.25·(-2) = 1."""
    average, seen = ema.Average(0.75, {}), []
    for value in (1.0, 5.0, -2.0):
        average.take({"w": torch.tensor([value])})
        average = ema.Average(0.75, average.state())  # from the volume
        seen.append(average.held["w"].item())
    assert seen == [1.0, 2.0, 1.0] and average.result({})["w"].item() == 1.0


def test_without_it_nothing_is_kept_and_the_last_adapter_is_the_result():
    average, last = ema.Average(0.0, {}), {"w": torch.ones(1)}
    average.take(last)
    assert average.state() == {} and average.result(last) is last


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Two rounds and a third that went on from them, of an average that keeps a half."""
    root = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOUQUET_KEEP_SENT", "1")
        federation = Federation(root, sample_prompts="", ema_decay=0.5, rounds=2, local_steps=1)
        federation.go(patch)
        federation.run_config |= {"resume": "7", "rounds": 3}
        federation.go(patch, run_id=8)
    return root, federation


@pytest.mark.slow
def test_a_run_leaves_the_average_of_its_rounds_also_when_it_was_taken_up(averaged):
    root, federation = averaged
    run = root / "adapters" / "8"
    one, two, three = (store.read_adapter(run / f"round-{number:04d}") for number in (1, 2, 3))
    final, entries = store.read_adapter(run / "final"), json.loads((run / "history.json").read_text())["rounds"]
    for key, value in final.items():  # halves are exact
        assert torch.equal(value, (one[key] * 0.5 + two[key] * 0.5) * 0.5 + three[key] * 0.5)
    assert entries[2]["average"] == check.digest(final) != entries[2]["adapter"]
    assert entries[2]["started_from"] == entries[1]["adapter"]  # the sites went on from the round itself
    kept = volume.read_state(run / "round-0003")
    assert tiny.equal({key.removeprefix("ema/"): value for key, value in kept.items()}, final)
    assert tiny.equal(federation.grid.adapters("4", federation.grid.sent)["site-1"], final)  # the last evaluation's


def judged(root, **more) -> list[str]:
    sites = {site: root / "cache" / site for site in ("site-1", "site-2")}
    return check.check(check.Evidence(root / "adapters" / "8", sites, tiny.models(), **more))


def test_the_checker_works_the_average_out_by_itself_and_finds_another(averaged):
    root, _ = averaged
    assert [said for said in judged(root) if "average" in said or "final" in said] == []
    history = root / "adapters" / "8" / "history.json"
    was = history.read_text()
    told = json.loads(was)
    told["config"]["ema_decay"] = 0.25
    history.write_text(json.dumps(told))
    assert any("moving average is" in said for said in judged(root))
    told["config"]["ema_decay"] = 0.0
    history.write_text(json.dumps(told))
    assert "the final adapter is not the last round's" in judged(root)
    history.write_text(was)
