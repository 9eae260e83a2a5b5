"""The benchmark: its arithmetic by hand, that the contenders do the same work, and every command of
docs/performance.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict

from app import model
from app.site import diffusion, train
from app.site.cache import Encoded
from benchmarks.gpu import gpu
from benchmarks.speed import __main__ as bench
from benchmarks.speed import base, contenders, floor, hub, sites, tries
from benchmarks.speed.contenders import PHASES, Result, Task, by_phase
from benchmarks.speed.naive import naive
from benchmarks.speed.watch import MESSAGE, Process, Watch, idle_cpu, processes
from bouquet import ROOT
from tests.kit import tiny

DOC = (ROOT / "docs/performance.md").read_text()


def round_of(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | seconds


# --- arithmetic
# ----------------------------------------------------------------------------------------------------------


def test_a_round_is_the_phases_of_its_slowest_site_and_the_rest_is_waiting():
    quick, slow = {"train": 2.0, "load": 1.0}, {"train": 4.0, "evaluate": 1.5}
    assert by_phase(10.0, [quick, slow], transfer=0.5) == round_of(train=4.0, evaluate=1.5, transfer=0.5, wait=4.0)


def test_clocks_of_two_machines_never_give_a_negative_wait():
    assert by_phase(5.0, [{"train": 5.1}])["wait"] == 0.0


def test_a_steady_round_is_the_median_over_all_runs_without_their_first_rounds():
    one = Result([round_of(train=100.0), round_of(train=3.0, wait=1.0), round_of(train=5.0, wait=1.0)], 0)
    other = Result([round_of(load=9.0), round_of(train=4.0, wait=7.0)], 0)
    assert bench.steady([one, other]) == round_of(train=4.0, wait=1.0) | {"round": 6.0}
    assert bench.steady([Result([round_of(train=2.0)], 0)]) == round_of(train=2.0) | {"round": 2.0}  # it has no other


def test_ratios_are_of_steady_rounds_and_of_the_largest_process():
    found = {
        "naive": [Result([round_of(), round_of(train=60.0)], 500.0), Result([round_of(), round_of(train=60.0)], 800.0)],
        "ours": [Result([round_of(train=50.0), round_of(train=6.0)], 400.0)],
        "floor": [Result([round_of(), round_of(train=4.0)], 100.0)],
    }
    assert bench.ratios(found) == {
        "naive / ours, a round": 10.0,
        "ours / floor, a round": 1.5,
        "ours / naive, peak memory of a site": 0.5,
    }
    assert "| train | 60.0 | 6.0 | 4.0 |" in bench.table(found)
    assert "| largest process of a site, peak MB | 800 | 400 | 100 |" in bench.table(found)


def test_the_slowest_of_taking_turns_is_the_slowest():
    seconds = tries.take_turns({"nothing": lambda: None, "sleep": lambda: time.sleep(0.05)}, 3)
    assert seconds["sleep"] >= 0.05 > seconds["nothing"]
    assert "| sleep | 50.0 | 2.00 |" in tries.markdown("x", {"plain": 0.025, "sleep": 0.05}, 1, "ms")


def test_the_sites_table_divides_the_hubs_seconds_by_the_sites():
    stub = {"sites": 200, "adapter-mb": 6.4, "seconds": 10.0, "more-mb": 130.0, "replies-mb": 1280.0}
    assert sites.table([], [stub]).splitlines()[-1] == "| 200 | 6.4 | 10.0 | 50 | 130 | 1280 |"


# --- the contenders do the same work
# -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos() -> Encoded:
    latents, text = tiny.batch(12)
    return Encoded.of(latents, text, torch.zeros(24, 16), [f"{n:064x}" for n in range(12)])


def test_the_floors_plain_loop_takes_the_apps_steps(photos):
    config = tiny.config(local_steps=5, caption_dropout=0.3)
    scheduler, one, other = diffusion.Objective.of(tiny.base()), tiny.unet(config), tiny.unet(config)
    loss = train.fit(one, scheduler, photos, config, train.accelerator(config), 3)
    assert floor.fit(other, scheduler, photos, config, 3) == pytest.approx(loss, rel=1e-6)
    ours, plain = model.adapter_of(one), model.adapter_of(other)
    assert not tiny.equal(ours, tiny.fresh(config))
    assert all(torch.allclose(ours[key], plain[key], atol=1e-6) for key in ours)


@pytest.fixture(scope="module")
def pipe():
    return naive.pipeline(str(tiny.models()), {"base": "tiny", "rank": 2})


def test_naives_loss_of_a_batch_is_the_apps(pipe):
    latents, text = tiny.batch(4)
    t = torch.tensor([1, 250, 500, 999])
    torch.manual_seed(5)
    plain = naive.loss_of(pipe, latents, text, t)
    torch.manual_seed(5)
    noise = torch.randn_like(latents)
    ours = diffusion.losses(pipe.unet, diffusion.Objective.of(tiny.base()), latents, {"text": text}, noise, t).mean()
    assert plain.item() == pytest.approx(ours.item(), rel=1e-6)


def test_naive_trains_from_the_adapter_that_arrived(tmp_path, monkeypatch):
    """What the quickstart does not: it is the reference for speed, not for its mistakes."""
    tiny.be_the_hub(monkeypatch)
    config = tiny.config(lora_targets="attention")
    sent = tiny.adapter(4, config)
    message = Message(RecordDict({"arrays": ArrayRecord(sent)}), dst_node_id=2, message_type="train")
    context = Context(
        7, 2, {"models-path": str(tiny.models()), "data-path": str(tmp_path)}, RecordDict(), {"base": "tiny", "rank": 2}
    )
    watch, _, folder, pipe = naive.opened(message, context)
    assert folder == str(tmp_path)
    assert tiny.equal(model.adapter_of(pipe.unet), sent)
    assert watch.seconds.keys() == {"start", "imports", "load"}


@pytest.mark.slow
def test_the_floor_runs_all_sites_and_gives_the_two_phases_of_arithmetic(tmp_path):
    base.build(tmp_path / "models", "tiny")
    folders = {name: tiny.site(tmp_path / name, 8, seed) for seed, name in enumerate(("site-1", "site-2"))}
    found = contenders.floor(Task(tmp_path, folders, 6, 2, 2, 4, 2), lambda line: None)
    assert len(found.rounds) == 2
    assert all(
        {phase for phase, seconds in entry.items() if seconds} == {"train", "evaluate"} for entry in found.rounds
    )
    assert found.peak_mb > 100


# --- looking at processes
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def child():
    """A process in a session of its own that is named like a message's and holds 60 MB."""
    code = (
        f"import ctypes, sys; ctypes.CDLL(None).prctl(15, {MESSAGE.encode()!r}); held = b'x' * 60_000_000;"
        " print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def test_a_message_is_seen_with_its_memory_and_when_it_began(child):
    watch = Watch({child: "site-1"})
    watch.start()
    while "site-1" not in watch.message_mb or "site-1" not in watch.whole_mb:
        time.sleep(0.05)
    watch.stop()
    assert 60 < watch.message_mb["site-1"] < 300
    assert 60 < watch.whole_mb["site-1"] < 300
    assert watch.began["site-1"][child] == pytest.approx(Process(child).began, abs=0.1)


def test_a_process_that_waits_uses_no_cpu_and_others_are_not_counted(child):
    assert idle_cpu({child: "site-1"}, 0.2) == {"site-1": 0.0}
    assert [process.pid for _, process in processes({child: "site-1"})] == [child]
    assert Process(os.getpid()).cpu > 0


# --- many sites, and a GPU
# -----------------------------------------------------------------------------------------------


def test_a_round_of_stub_sites_goes_through_the_hubs_own_code(monkeypatch):
    tiny.be_the_hub(monkeypatch)
    found = hub.round_at_the_hub(6, 0.1)
    assert found["sites"] == 6
    assert found["replies-mb"] == pytest.approx(6 * 0.1, rel=0.3)  # their files' headers are the rest
    assert found["seconds"] > 0


def test_the_gpus_unet_is_stable_diffusion_1_5s():
    unet = gpu.build_unet(gpu.Shape(), tiny.config(lora_rank=8, lora_targets="attention"), "meta")
    assert sum(p.numel() for p in unet.parameters() if not p.requires_grad) == 859_520_964
    assert gpu.Shape().side == 64
    assert (
        sum(p.numel() for part in gpu.build_encoders(gpu.Shape(), "meta") for p in part.parameters())
        == 83_653_863 + 123_060_480
    )


def test_the_largest_batch_is_the_last_that_fits():
    assert gpu.largest_batch(lambda size: size <= 50, 16, 256) == 32
    assert gpu.largest_batch(lambda size: size <= 50, 64, 256) == 0
    assert gpu.largest_batch(lambda size: True, 16, 100) == 64


def test_the_gpu_table_divides_by_diffusers_loop_and_by_the_matrix_rate():
    rows = {
        "ours, 8 images": gpu.Cost(30.0, 2048.0, 5.0, 2e12),
        "diffusers' loop, 8 images": gpu.Cost(20.0, 4096.0, 7.5, 3e12),
    }
    assert gpu.table(rows, 120.0).splitlines()[2:] == [
        "| ours, 8 images | 30.00 | 1.50 | 60.00 | 50% | 2.0 | 5.0 |",
        "| diffusers' loop, 8 images | 20.00 | 1.00 | 60.00 | 50% | 4.0 | 7.5 |",
    ]


def test_diffusers_loop_trains_the_adapter_alone():
    config = tiny.config(lora_targets="attention", batch_size=2, local_steps=2)
    unet = gpu.build_unet(gpu.TINY, config, "cpu")
    before, fresh = {name: p.clone() for name, p in unet.named_parameters()}, model.adapter_of(unet)
    files = gpu.random_files(gpu.TINY, 3)
    loss = gpu.diffusers_fit(
        unet,
        *gpu.build_encoders(gpu.TINY, "cpu"),
        gpu.schedule(),
        files,
        gpu.TINY,
        config,
        train.accelerator(config),
        1,
    )
    assert 0.5 < loss < 5
    assert not tiny.equal(model.adapter_of(unet), fresh)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters() if not p.requires_grad)


def test_without_a_gpu_it_says_so_and_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["gpu"]) == 2
    assert "nothing was measured" in capsys.readouterr().err


# --- the commands of docs/performance.md
# ---------------------------------------------------------------------------------

RUN = {  # what the page says: how it is run here, and the first words of a row of its answer
    "scripts/bench sites": ("scripts/bench sites --tiny --stub-only", "| 20 | 0.1 |"),
    "scripts/bench sizes": ("scripts/bench sizes --tiny", "| rank 2 |"),
    "scripts/bench memory": ("scripts/bench memory --tiny", "| again |"),
    "scripts/bench large": ("scripts/bench large --tiny", "| connection reset |"),
    "scripts/bench tries": ("scripts/bench tries --tiny", "| fused AdamW |"),
    "scripts/bench gpu-tries --device cpu --tiny": (
        "scripts/bench gpu-tries --device cpu --tiny",
        "| one CUDA graph a step |",
    ),
    "scripts/bench gpu-families --device cpu --tiny": (
        "scripts/bench gpu-families --device cpu --tiny",
        "| Z-Image, checkpointing |",
    ),
    "scripts/bench gpu --device cpu --tiny": ("scripts/bench gpu --device cpu --tiny", "| ours, 8 images |"),
}
QUICK = "scripts/bench --quick --plot phases.png"
# the first below, at the smallest sizes; the second is it at full size
SLOW = {QUICK, "scripts/bench --plot docs/performance/phases.png"}
# their dry runs on the CPU: above, and tests/test_accept.py
ON_A_GPU = {"scripts/bench gpu", "scripts/bench gpu-tries", "scripts/bench gpu-families", "scripts/bench accept"}


def test_every_command_of_the_page_is_executed_here():
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL))
    commands = {line.split("#")[0].strip() for line in blocks.splitlines() if line.strip()}
    assert commands == RUN.keys() | SLOW | ON_A_GPU


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN)
def test_a_command_gives_its_table(command, tmp_path, monkeypatch, capsys):
    """By what scripts/bench calls, which the comparison below starts as it is: imports and all, in each of them."""
    (asked, row), threads = RUN[command], torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))  # one that starts a deployment says where that is
    torch.set_num_threads(1)
    try:
        assert bench.main([*asked.split()[1:], "--json", str(tmp_path / "found.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    assert any(line.startswith(row) for line in capsys.readouterr().out.splitlines())
    assert json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_the_comparison_runs_all_three_on_a_real_deployment_and_draws_its_bars(tmp_path):
    asked = [
        *QUICK.replace("phases.png", str(tmp_path / "phases.png")).split(),
        "--tiny",
        "--repeats=1",
        "--rounds=2",
        f"--json={tmp_path / 'found.json'}",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    steady = found["steady"]
    assert steady.keys() == {"naive", "ours", "floor"}
    for phase in ("start", "imports", "load", "encode", "train", "evaluate", "transfer"):
        assert steady["naive"][phase] > 0, phase
    for phase in ("load", "train", "evaluate"):
        assert steady["ours"][phase] > 0, phase
    for kind in ("naive", "ours"):  # what is in no phase is waiting, of which a busy machine may leave nothing
        phases = sum(seconds for phase, seconds in steady[kind].items() if phase != "round")
        assert phases >= steady[kind]["round"] - 0.01, kind
    assert steady["ours"]["encode"] < steady["naive"]["encode"]  # read, not encoded
    assert (tmp_path / "phases.png").read_bytes().startswith(b"\x89PNG")
