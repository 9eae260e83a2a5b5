"""`scripts/bench accept`: what it says and leaves whatever ends it, its arithmetic, and the whole of it on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import bases, model
from benchmarks.gpu import accept, accept_child, accept_machine, accept_memory, accept_runs, gpu
from benchmarks.gpu.accept import CHECKS, Check
from benchmarks.gpu.accept_desk import Desk, Skip, Wrong
from benchmarks.gpu.accept_found import NO_TIME, Found, Report, Row, Target
from benchmarks.gpu.accept_world import TINY, World
from benchmarks.speed import __main__ as bench
from benchmarks.speed import base
from bouquet import ROOT
from bouquet.hub.deployment import is_alive
from tests.kit.wait import PATIENT, until

MISSED, MET = Target("round / floor", 1.4, most=1.25), Target("round / floor", 1.1, most=1.25)
MIB = 2**20
SLEEPS = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]


def passed(name: str, *targets: Target, judged: bool = True) -> Row:
    return Row.of(name, Found("it works", {"number": 1}, list(targets)), 2.0, judged)


def report(folder: Path, *rows: Row, wanted: list[str] | None = None) -> Report:
    told = Report(folder / "found.json", wanted or [row.name for row in rows], {})
    for row in rows:
        told.add(row)
    return told


# --- rows, table, exit code
# ----------------------------------------------------------------------------------------------


def test_a_missed_target_has_its_own_column_and_does_not_hide_that_the_check_worked(tmp_path):
    table = report(tmp_path, passed("sd15", MISSED), passed("loop", MET), passed("mini")).table().splitlines()
    assert table[2:] == [
        "| sd15 | pass | fail | it works; round / floor 1.40 (at most 1.25) | 2 |",
        "| loop | pass | pass | it works; round / floor 1.10 (at most 1.25) | 2 |",
        "| mini | pass | - | it works | 2 |",
    ]


def test_on_the_cpu_a_target_is_told_and_not_judged():
    row = passed("sd15", MISSED, judged=False)
    assert (row.state, row.target, row.wrong) == ("pass", "", False)
    assert "1.40" in row.text


@pytest.mark.parametrize(
    ("rows", "code", "verdict"),
    [
        ([passed("device"), passed("loop", MET)], 0, "accepted"),
        ([passed("device"), Row("memory", "skip", "needs a GPU", 0.0)], 0, "accepted"),
        ([passed("device"), Row("mini", "fail", "no", 1.0)], 1, "not accepted"),
        ([passed("loop", MISSED)], 1, "not accepted"),
        ([passed("device"), Row("loop", "skip", NO_TIME, 0.0)], 1, "incomplete"),
        ([Row("mini", "fail", "no", 1.0), Row("loop", "skip", f"{NO_TIME}: cut", 3.0)], 1, "not accepted"),
    ],
)
def test_the_exit_code_and_the_verdict(rows, code, verdict, tmp_path):
    told = report(tmp_path, *rows)
    assert (told.code, told.verdict) == (code, verdict)


def test_what_was_never_reached_makes_it_incomplete(tmp_path):
    told = report(tmp_path, passed("device"), wanted=["device", "loop"])
    assert (told.code, told.verdict) == (1, "incomplete")
    assert json.loads(told.file.read_text())["missing"] == ["loop"]


def test_rows_are_in_the_order_of_the_checks_whichever_ends_first(tmp_path):
    told = report(tmp_path, passed("loop"), passed("killed"), wanted=["killed", "loop"])
    assert [row.name for row in told.rows] == ["killed", "loop"]


def test_a_target_is_json_though_it_may_have_no_end(tmp_path):
    told = json.loads(report(tmp_path, passed("loop", Target("ours / diffusers'", 2.5, 2.0))).file.read_text())
    assert told["checks"]["loop"]["facts"]["targets"] == [
        {"name": "ours / diffusers'", "value": 2.5, "least": 2.0, "met": True}
    ]


def test_the_checks_are_those_that_the_help_tells_in_its_order():
    assert re.findall(r"^  ([a-z0-9]+)  +\S", accept.__doc__, re.MULTILINE) == list(CHECKS)


# --- the runner, with checks that are none
# -------------------------------------------------------------------------------


def found(desk: Desk) -> Found:
    return Found("fine")


def wrong(desk: Desk) -> Found:
    raise Wrong("broken")


def crash(desk: Desk) -> Found:
    raise KeyError("nobody thought of it")


def needless(desk: Desk) -> Found:
    raise Skip("needs a GPU")


def endless(desk: Desk) -> Found:
    return Found(desk.command(SLEEPS))


def slow(desk: Desk) -> Found:
    time.sleep(0.5)
    return Found("slow")


def run(folder: Path, limit: float = 60.0, **checks: Check) -> tuple[int, dict]:
    asked = SimpleNamespace(device="cpu", tiny=True, json=folder / "found.json", limit=limit)
    code = accept.accept(asked, list(checks), checks, time.monotonic())
    return code, json.loads((folder / "found.json").read_text())


def test_each_check_is_told_and_none_stops_the_others(tmp_path, capsys):
    names = {"wrong": wrong, "crash": crash, "needless": needless, "found": found}
    code, told = run(tmp_path, **{name: Check(work, 0, 5) for name, work in names.items()})
    assert code == 1
    states = {"wrong": "fail", "crash": "fail", "needless": "skip", "found": "pass"}
    assert {name: row["state"] for name, row in told["checks"].items()} == states
    lines = capsys.readouterr().out.splitlines()
    words = zip(states.items(), ("broken", "KeyError:", "needs", "fine"), strict=True)
    assert [line.split()[:3] for line in lines[:4]] == [[name, state, word] for (name, state), word in words]
    assert lines[5] == "| check | result | target | found | s |"
    assert "not accepted: wrong (fail), crash (fail)" in lines[-1]
    assert lines[-2].endswith("scripts/bench gpu-families")  # the large families' rows are a command of their own
    assert told["state"] == "not accepted"


def test_a_check_that_takes_too_long_fails_and_what_it_started_is_ended(tmp_path):
    began = time.monotonic()
    code, told = run(tmp_path, endless=Check(endless, 0, 1), found=Check(found, 0, 5))
    assert (code, told["checks"]["endless"]["state"], told["checks"]["found"]["state"]) == (1, "fail", "pass")
    assert "took too long" in told["checks"]["endless"]["text"]
    assert time.monotonic() - began < 300  # and not the 600 that it would sleep


def test_what_cannot_begin_in_time_is_skipped_and_makes_it_incomplete(tmp_path):
    code, told = run(tmp_path, limit=accept.ENDING + 3, found=Check(found, 0, 5), long=Check(found, 10, 20))
    assert (code, told["state"]) == (1, "incomplete")
    assert (told["checks"]["long"]["state"], told["checks"]["long"]["text"]) == ("skip", NO_TIME)
    assert told["checks"]["found"]["state"] == "pass"


def test_what_the_end_of_all_time_cuts_off_was_not_looked_at(tmp_path):
    code, told = run(tmp_path, limit=accept.ENDING + 1, endless=Check(endless, 0, 60))
    assert (code, told["state"]) == (1, "incomplete")
    assert told["checks"]["endless"]["state"] == "skip" and told["checks"]["endless"]["text"].startswith(NO_TIME)


def test_a_check_that_waits_lets_the_next_one_run_meanwhile(tmp_path, capsys):
    code, told = run(tmp_path, slow=Check(slow, 0, 5, waits=True), found=Check(found, 0, 5))
    assert code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["found", "slow"]
    assert list(told["checks"]) == ["slow", "found"]


HELD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from benchmarks.gpu import accept
from benchmarks.gpu.accept_found import Found
endless = [sys.executable, "-c", "import time; time.sleep(600)"]
checks = {"first": accept.Check(lambda desk: Found("fine"), 0, 5)}
checks["held"] = accept.Check(lambda desk: desk.command(endless), 0, 300)
asked = SimpleNamespace(device="cpu", tiny=True, json=Path(sys.argv[1]) / "found.json", limit=60)
sys.exit(accept.accept(asked, list(checks), checks, time.monotonic()))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_it_the_json_has_what_was_found(number, tmp_path):
    """A signal that can be heard also leaves no process and no folder."""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", HELD, tmp_path], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("first")
        children = until(lambda: children_of(process.pid))
        process.send_signal(number)
        code = process.wait(PATIENT)
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["checks"]["first"]["state"] == "pass"
    if number == signal.SIGKILL:
        assert told["state"] == "running"
        for child in children:
            os.kill(child, signal.SIGKILL)
        return
    assert (code, told["state"], told["missing"]) == (128 + number, "cut off", ["held"])
    assert children and not any(is_alive(child) for child in children)
    assert not list(tmp_path.glob("bouquet-accept-*"))


def children_of(pid: int) -> list[int]:
    """Those that any thread of a process has."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


# --- the command line
# ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench.main(["accept", "--json", str(tmp_path / "found.json")]) == 2
    assert "nothing was looked at" in capsys.readouterr().err
    assert not (tmp_path / "found.json").exists()


def test_only_chooses_by_name_and_a_mistyped_one_is_told(capsys):
    assert accept.chosen("") == list(CHECKS)
    assert accept.chosen("mini|^sd15$") == ["mini", "sd15"]
    assert accept.chosen("(") == []
    assert bench.main(["accept", "--device", "cpu", "--only", "minni"]) == 1
    assert "finds none of device, fork" in capsys.readouterr().err


# --- arithmetic
# ----------------------------------------------------------------------------------------------------------


def entry(number: int, seconds: float, **phases: float) -> dict:
    metrics = {f"seconds-{phase}": value for phase, value in phases.items()}
    return {
        "round": number,
        "seconds": seconds,
        "started_from": str(number - 1),
        "adapter": str(number),
        "sites": {"site-1": metrics},
    }


def test_a_rounds_rest_is_waiting_and_steady_is_the_median_of_every_phase():
    rounds = [
        accept_runs.by_phase(e, "site-1")
        for e in (entry(2, 5.0, train=3.0, load=1.0), entry(3, 7.0, train=5.0, other=0.5))
    ]
    assert rounds[0] == {"train": 3.0, "load": 1.0, "wait": 1.0, "round": 5.0}
    assert accept_runs.steady(rounds) == {"train": 4.0, "load": 0.5, "wait": 1.25, "round": 6.0, "other": 0.25}


def test_a_run_is_compared_with_its_floor_without_the_first_round_of_it():
    rounds = [entry(1, 60.0, train=9.0), entry(2, 6.0, train=4.0), entry(3, 6.5, train=4.0)]
    told = accept_runs.beside(rounds, [{"evaluate": 1.0, "train": 3.8}, {"evaluate": 1.0, "train": 4.2}], 400)
    [target] = told.targets
    assert target.value == pytest.approx(6.25 / 5.0) and target.met
    assert told.facts["images/s"] == 100.0
    assert told.facts["steady"]["wait"] == 2.25
    assert told.facts["first"]["round"] == 60.0


def test_a_history_is_a_chain_of_all_its_rounds():
    whole = [entry(n, 1.0) for n in (1, 2, 3, 4)]
    assert accept_runs.breaks(whole, 4) == []
    assert accept_runs.breaks(whole[1:], 4) == ["the history has rounds [2, 3, 4]"]
    whole[2]["started_from"] = "another"
    assert accept_runs.breaks(whole, 4) == ["round 3 did not start from round 2's adapter"]


def test_a_history_that_lacks_a_gpus_figures_is_told_by_round_and_site():
    whole = {"gpu": "NVIDIA A10", "gpu-peak-mib": 1.0, "gpu-utilisation": 1.0, "gpu-joules": 1.0}
    lacking = {"gpu": "no GPU", "gpu-peak-mib": 1.0, "gpu-utilisation": 1.0}
    told = {"rounds": [{"round": 1, "sites": {"site-1": whole, "site-2": lacking}}]}
    assert accept_runs.unmetered(told, {"gpu-peak-mib", "gpu-joules"}) == [
        "round 1 site-2: a GPU's name",
        "round 1 site-2: gpu-joules",
    ]
    assert accept_runs.unmetered(told, {"gpu-peak-mib"}) == ["round 1 site-2: a GPU's name"]


def test_the_figures_that_a_history_must_have_are_those_that_the_gpus_driver_has(tmp_path, monkeypatch):
    from tests.kit.nvml import StandIn
    from tests.kit.nvml import gpu as line

    stand_in = StandIn(tmp_path, monkeypatch)
    stand_in.state(line(energy=5, busy=3, free=20000))
    with World(tmp_path / "world", "cuda", TINY) as world:
        assert world.pin == "GPU-aaaa1111"
        assert world.gpu_used() == (24576 - 20000) * MIB
        assert world.gpu_says() == {"gpu-peak-mib", "gpu-utilisation", "gpu-joules"}
        stand_in.state(line(energy=-1, busy=3))
        assert world.gpu_says() == {"gpu-peak-mib", "gpu-utilisation"}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, None),
        ({"before": 900 * MIB, "after": 1100 * MIB}, None),
        ({"before": 900 * MIB, "after": 1200 * MIB}, "300 MiB"),
        ({"workers": [{7}, {7}]}, "another one for the second"),
        ({"workers": [{7, 9}, {8}]}, "not one worker a run"),
        ({"workers": [set(), {8}]}, "not one worker a run"),
        ({"left": [{7}, set()]}, "still there"),
    ],
)
def test_two_runs_have_a_worker_each_that_leaves_nothing(changes, wrong):
    seen = accept_runs.Pair(**({"before": None, "workers": [{7}, {8}], "left": [set(), set()]} | changes))
    if wrong is None:
        assert "one worker a run" in accept_runs.judged(seen).text
    else:
        with pytest.raises(Wrong, match=wrong):
            accept_runs.judged(seen)


NEEDS = {  # MiB, as accept_child.probe says it
    "context": 500.0, "evaluate reserved": 300.0, "half allocated": 2000.0, "half reserved": 2400.0,
    "whole allocated": 4000.0,
}  # fmt: skip


def test_the_ballast_leaves_room_for_half_of_the_batch_and_then_for_less():
    tight, tighter = accept_memory.rooms(NEEDS)
    assert 500 + 2400 < tight < 500 + 4000
    assert 500 + 300 < tighter < 500 + 2000


def test_sizes_that_no_ballast_can_tell_apart_are_refused():
    with pytest.raises(Wrong, match="no ballast"):
        accept_memory.rooms(NEEDS | {"half reserved": 3900.0})


def test_the_best_batch_is_the_fastest_of_ours():
    costs = {
        name: {"images_a_second": speed, "flops": flops}
        for name, speed, flops in (
            # fmt: skip
            ("ours, 8 images", 40.0, 2e12),
            ("ours, 64 images", 60.0, 2e12),
            (accept_machine.DIFFUSERS, 16.0, 9e12),
        )
    }
    assert accept_machine.best_share(costs, 300.0) == ("ours, 64 images", 0.4)
    assert accept_machine.ours_to_diffusers(costs) == 2.5


def test_estimate_and_peak_are_read_from_preflights_own_lines():
    texts = {
        "memory": "bench at 512², 8 images a step: about 9.3 GiB of GPU memory, 78.0 GiB free",
        "step": "0.21 s a step on the GPU, 8 images each; peak memory 8.02 GiB",
    }
    assert accept_machine.estimate_and_peak(texts) == (9.3, 8.02)
    with pytest.raises(Wrong, match="no estimate"):
        accept_machine.estimate_and_peak({"memory": "quite a lot"})


# --- what it is made of
# --------------------------------------------------------------------------------------------------


def test_the_base_of_stable_diffusions_shape_is_one_that_the_app_takes(tmp_path):
    folder = base.build(tmp_path, "sd15-tiny")
    assert json.loads((folder / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == gpu.TINY.tokens
    unet = model.load_net(bases.locate("bench", tmp_path))
    assert unet.config.block_out_channels == list(gpu.TINY.unet) or unet.config.block_out_channels == gpu.TINY.unet
    assert model.fingerprint(folder, tmp_path / "memory")["base"]
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 20_000_000


def test_photos_are_pictures_with_captions_that_a_site_can_read(tmp_path):
    from app.site.photos import data

    with World(tmp_path / "world", "cpu", TINY) as world:
        world.begin(["photos"])
        with Desk(world, 60) as desk:
            world.have("photos", desk)
        parts = [data.scan(folder) for folder in world.sites.values()]
    assert tuple(len(part.photos) for part in parts) == TINY.photos
    assert {photo.caption.split()[2].rstrip(",") for photo in parts[0].photos} > {"lily", "poppy"}
    assert not (tmp_path / "world").exists()


def test_nvmls_facts_are_those_of_the_first_gpu_and_what_it_cannot_say_is_none(tmp_path, monkeypatch):
    from tests.kit.nvml import StandIn
    from tests.kit.nvml import gpu as line

    stand_in = StandIn(tmp_path, monkeypatch)
    stand_in.state(line(energy=5, processes="42:300"), driver="580.95.05 13000")
    facts = accept_child.nvml()
    assert (facts["driver"], facts["driver's cuda"], facts["processes"]) == ("580.95.05", "13.0", {"42": 300})
    assert facts["energy counter"] is True
    assert facts["power limit W"] is None  # the stand-in has no such function
    stand_in.state(line(energy=-1))
    assert accept_child.nvml()["energy counter"] is None


# --- all of it
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_dry_run_goes_through_every_check_and_leaves_nothing_behind(tmp_path):
    command = ["scripts/bench", "accept", "--device", "cpu", "--tiny", "--limit", "3600"]
    command += ["--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    told = json.loads((tmp_path / "found.json").read_text())
    states = {name: row["state"] for name, row in told["checks"].items()}
    assert states == {name: "skip" if name == "memory" else "pass" for name in CHECKS}, done.stdout[-3000:]
    assert (done.returncode, told["state"], told["missing"]) == (0, "accepted", [])
    assert not list(tmp_path.glob("bouquet-*"))
    assert "which says nothing of a GPU: accepted" in done.stdout
    steady = told["checks"]["sd15"]["facts"]["steady"]
    assert steady["train"] > 0 and steady["evaluate"] > 0 and steady["round"] > steady["train"]
