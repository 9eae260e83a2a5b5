"""The shared volume: whole folders or none, and adapters that PEFT reads as they were."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app import files, model
from app.adapter import store
from app.errors import AdapterError
from app.families import sd
from app.hub import volume
from tests.kit import tiny
from tests.kit.wait import PATIENT

ADAPTER = tiny.adapter(1)


def fill(adapter: model.Adapter, note: str = ""):
    def write(folder: Path) -> None:
        store.write_peft(folder, adapter, tiny.CONFIG, sd.FAMILY)
        (folder / "note.txt").write_text(note)

    return write


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_rounds_folder_holds_the_adapter_its_config_and_its_metrics(tmp_path):
    folder = volume.write_round(tmp_path / "7", 3, ADAPTER, tiny.CONFIG, sd.FAMILY, {"train_loss": 0.5}, {})
    assert folder == tmp_path / "7" / "round-0003"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.json", "server_state.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == {"train_loss": 0.5}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    folder = volume.write_round(tmp_path, 1, ADAPTER, tiny.CONFIG, sd.FAMILY, {}, {})
    assert tiny.equal(store.read_adapter(folder), ADAPTER)


def test_alpha_is_the_rank(tmp_path):
    folder = volume.write_round(tmp_path, 1, ADAPTER, tiny.CONFIG, sd.FAMILY, {}, {})
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 2)
    assert settings["target_modules"] == list(sd.FAMILY.targets["attention+resnet"])


def test_peft_loads_the_folder_and_the_unet_says_what_it_says_in_the_app(tmp_path):
    from peft import PeftModel

    folder = volume.write_round(tmp_path, 1, ADAPTER, tiny.CONFIG, sd.FAMILY, {}, {})
    latents, text = tiny.batch(2)
    at = torch.tensor([10, 500])
    unet = tiny.unet()
    model.apply_adapter(unet, ADAPTER)
    loaded = PeftModel.from_pretrained(model.load_net(tiny.base()), folder)
    torch.testing.assert_close(loaded(latents, at, text).sample, unet(latents, at, text).sample, rtol=1e-5, atol=1e-6)


def test_others_who_share_the_volume_may_read_every_file(tmp_path):
    folder = volume.write_round(tmp_path, 1, ADAPTER, tiny.CONFIG, sd.FAMILY, {}, {})
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


# --- all or nothing
# ------------------------------------------------------------------------------------------------------


def test_a_failure_while_writing_leaves_the_folder_before_untouched(tmp_path):
    target = tmp_path / "round-0001"
    store.write_folder(target, fill(ADAPTER, "before"), ADAPTER)
    before = tree(target)

    def broken(folder: Path) -> None:
        fill(tiny.adapter(2), "half")(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write_folder(target, broken, tiny.adapter(2))
    assert tree(target) == before


def test_a_failure_while_writing_leaves_no_folder_where_there_was_none(tmp_path):
    def broken(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        store.write_folder(tmp_path / "round-0001", broken, ADAPTER)
    assert not (tmp_path / "round-0001").exists()


def test_an_adapter_that_does_not_read_back_as_it_was_is_not_put_in_place(tmp_path):
    with pytest.raises(OSError, match="is not what was written"):
        store.write_folder(tmp_path / "final", fill(tiny.adapter(2)), ADAPTER)
    short = dict(list(ADAPTER.items())[1:])
    with pytest.raises(AdapterError, match="ADAPTER-01"):
        store.write_folder(tmp_path / "final", fill(short), ADAPTER)
    assert not (tmp_path / "final").exists()


def test_after_a_failure_the_next_writing_succeeds_and_cleans_up(tmp_path):
    def broken(folder: Path) -> None:
        (folder / "rest").write_text("half")
        raise OSError

    with pytest.raises(OSError):
        store.write_folder(tmp_path / "final", broken, ADAPTER)
    store.write_folder(tmp_path / "final", fill(ADAPTER), ADAPTER)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "rest").exists()


def test_a_second_writing_replaces_the_first_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "final"
    store.write_folder(target, fill(ADAPTER, "first"), ADAPTER)
    store.write_folder(target, fill(tiny.adapter(2), "second"), tiny.adapter(2))
    assert (target / "note.txt").read_text() == "second"
    assert tiny.equal(store.read_adapter(target), tiny.adapter(2))
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from app import files
from app.adapter import store
from app.families import sd
from app.hub import volume
from app.config import RunConfig
from safetensors.torch import load_file

root, adapter = Path(sys.argv[1]), load_file(sys.argv[2])

def watch(moment):
    # SIGKILL to this process just before its `moment`th write, sync or rename
    calls = iter(range(1, 1000))
    def watched(real):
        def call(*args, **kwargs):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    of_files = ((Path, "write_text"), (os, "fsync"), (Path, "replace"), (Path, "chmod"))
    for owner, name in ((volume, "save_file"), (store, "save_file"), *of_files):
        setattr(owner, name, watched(getattr(owner, name)))

moment, ends = 0, []
while not ends or ends[-1] == signal.SIGKILL:
    moment += 1
    run = root / str(moment) / "8"
    (root / str(moment) / "7").mkdir(parents=True)
    run.mkdir()
    volume.point_latest(root / str(moment) / "7")
    files.write_json(run / "history.json", {"new": False})
    if (child := os.fork()) == 0:
        watch(moment)
        volume.write_round(run, 1, adapter, RunConfig.read({}), sd.FAMILY, {"new": True}, {})
        files.write_json(run / "history.json", {"new": True})
        volume.point_latest(run)
        os._exit(0)
    ends.append(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_files_the_old_or_the_new(tmp_path):
    """SIGKILL before each single write, sync and rename of a round, the history and `latest`, one process for each."""
    adapter = {"w.lora_A.weight": torch.full((2, 4), 2.0)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(tmp_path / "adapter.safetensors")]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends == [signal.SIGKILL] * (len(ends) - 1) + [0] and len(ends) > 15
    seen = []
    for moment in range(1, len(ends) + 1):
        shared = tmp_path / str(moment)
        run = shared / "8"
        if written := (run / "round-0001").exists():
            assert tiny.equal(store.read_adapter(run / "round-0001"), adapter)
            assert json.loads((run / "round-0001" / "metrics.json").read_text()) == {"new": True}
        told = json.loads((run / "history.json").read_text())["new"]
        seen.append((written, told, os.readlink(shared / "latest")))
    # nothing is told before it is true
    order = [(False, False, "7"), (True, False, "7"), (True, True, "7"), (True, True, "8")]
    assert seen == sorted(seen, key=order.index) and set(seen) == set(order)


# --- the pointer and the history
# -------------------------------------------------------------------------------------------


def test_latest_is_a_relative_link_that_moves_with_the_volume(tmp_path):
    run = tmp_path / "adapters" / "7"
    volume.write_round(run, 1, ADAPTER, tiny.CONFIG, sd.FAMILY, {}, {})
    volume.point_latest(run)
    assert os.readlink(tmp_path / "adapters" / "latest") == "7"
    (tmp_path / "adapters").rename(tmp_path / "moved")
    assert tiny.equal(store.read_adapter(tmp_path / "moved" / "latest" / "round-0001"), ADAPTER)


def test_latest_switches_to_the_next_run_and_leaves_the_former(tmp_path):
    for name in ("7", "8"):
        (tmp_path / name).mkdir()
        volume.point_latest(tmp_path / name)
        assert os.readlink(tmp_path / "latest") == name
    assert sorted(path.name for path in tmp_path.iterdir()) == [".latest.lock", "7", "8", "latest"]


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "history.json"
    files.write_json(path, {"rounds": [1]})
    with pytest.raises(TypeError):
        files.write_json(path, {"rounds": [1, 2], "odd": object()})
    assert json.loads(path.read_text()) == {"rounds": [1]}
    files.write_json(path, {"rounds": [1, 2]})
    assert json.loads(path.read_text()) == {"rounds": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_json_is_not_written_and_the_file_before_it_stays(tmp_path, value):
    files.write_json(tmp_path / "history.json", {"loss": 0.5})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "history.json", {"loss": value})
    assert json.loads((tmp_path / "history.json").read_text()) == {"loss": 0.5}
