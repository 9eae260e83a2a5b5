"""What the hub tells a tracker, read back from TensorBoard's files; other trackers' packages, secrets and failures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import records
from app.errors import ConfigError
from app.hub import tracking
from app.hub.history import Round, Validation
from bouquet import ROOT
from tests.kit import tiny
from tests.kit.memory import Federation, spoil_from
from tests.kit.wait import PATIENT

ROUND = {
    "round": 3,
    "started_from": "a",
    "adapter": "b",
    "train_loss": 0.25,
    "seconds": 12.5,
    "sites": {
        "rose": {
            "train-loss": 0.2,
            "update-norm": 1.5,
            "seconds-train": 9.0,
            "gpu-peak-mib": 812.0,
            "weight": 40,
            "gpu": "NVIDIA L4",
        }
    },
    "refused": [{"site": "lily/clinic", "reason": "ADAPTER-04  The update is 9.0 times the median one."}],
}


def read(run) -> EventAccumulator:
    return EventAccumulator(str(run / "tracker"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 5)) for event in events.Scalars(name)]


def same(events: EventAccumulator, name: str, expected: dict[int, float]) -> None:
    """TensorBoard holds float32."""
    assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A whole run with TensorBoard: (its history, what its files say)."""
    federation = Federation(tmp_path_factory.mktemp("tracked"), tracker="tensorboard")
    with pytest.MonkeyPatch.context() as patch:
        run = federation.go(patch)
    return federation.history(), read(run)


def test_losses_by_round_and_site_are_the_historys(tracked):
    history, events = tracked
    after, rounds = history["validation"], history["rounds"]
    same(events, "validation/all", {entry["after_round"]: entry["weighted"] for entry in after})
    same(events, "train/all", {entry["round"]: entry["train_loss"] for entry in rounds})
    for site in ("site-1", "site-2"):
        same(events, f"validation/{site}", {entry["after_round"]: entry["sites"][site] for entry in after})
        same(events, f"norm/{site}", {entry["round"]: entry["sites"][site]["update-norm"] for entry in rounds})
    assert [step for step, _ in scalars(events, "seconds train/site-2")] == [1, 2]


def test_each_prompt_has_a_picture_of_the_base_and_of_every_round(tracked):
    _, events = tracked
    names = [f"samples/{tracking.plain(prompt)}" for prompt in tiny.CONFIG.prompts]
    assert sorted(events.Tags()["images"]) == sorted(names)
    pictures = {
        event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).astype(int)
        for event in events.Images(names[0])
    }
    assert sorted(pictures) == [0, 1, 2] and np.abs(pictures[0] - pictures[2]).max() > 0


def test_the_runs_configuration_is_beside_the_numbers(tracked):
    [told] = tracked[1].Tensors("config/text_summary")[0].tensor_proto.string_val
    assert b"learning_rate: 0.01" in told and b"tracker: tensorboard" in told and b"run: 7" in told


def test_by_hand_a_rounds_numbers_stand_under_the_names_one_looks_for(tmp_path):
    tracker = tracking.start(tiny.config(tracker="tensorboard"), tmp_path / "7")
    tracker.validation(Validation(2, 0.5, {"rose": 0.5}))
    tracker.round(records.of(Round, ROUND))
    tracker.close()
    events = read(tmp_path / "7")
    values = {name: scalars(events, name) for name in events.Tags()["scalars"]}
    assert values == {
        "validation/all": [(2, 0.5)],
        "validation/rose": [(2, 0.5)],
        "train/all": [(3, 0.25)],
        "train/rose": [(3, 0.2)],
        "norm/rose": [(3, 1.5)],
        "weight/rose": [(3, 40.0)],
        "seconds train/rose": [(3, 9.0)],
        "gpu peak-mib/rose": [(3, 812.0)],
        "round/seconds": [(3, 12.5)],
        "round/refused": [(3, 1.0)],
        "round/sites": [(3, 1.0)],
    }
    [why] = events.Tensors("refused/text_summary")
    assert why.tensor_proto.string_val == [b"    lily_clinic: ADAPTER-04  The update is 9.0 times the median one."]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("../../x", "____x"), ("..", "_"), ("", "_"), ("a/b", "a_b"), ("rose", "rose"), ("v1.5 a", "v1.5 a")],
)
def test_a_name_is_no_path_to_a_tracker(name, shown):
    assert tracking.plain(name) == shown


def test_without_a_tracker_nothing_is_written_and_no_package_is_needed(finished):
    _, run = finished
    assert not (run / "tracker").exists()


def test_a_tracker_whose_package_is_absent_ends_the_run_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    federation = Federation(tmp_path, tracker="mlflow")
    error = federation.fails(monkeypatch, "CONFIG-04")
    assert "package is not installed" in error.found and "mlflow" in error.fix
    assert federation.grid.sent == [] and not (federation.adapters / "7" / "history.json").exists()


def test_a_tracker_that_does_not_begin_is_named_without_its_words(tmp_path, monkeypatch):
    def begin(self):
        raise ConnectionError("https://anna:secret@example.org refused")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", begin)
    with pytest.raises(ConfigError, match="CONFIG-04") as refused:
        tracking.start(tiny.config(tracker="tensorboard"), tmp_path)
    assert "secret" not in refused.value.report() and "ConnectionError" in refused.value.found


def test_a_tracker_that_fails_later_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def full(self, values, step):
        if step:
            raise OSError(28, "no space left")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", full)
    federation = Federation(tmp_path, tracker="tensorboard")
    federation.go(monkeypatch)
    assert federation.history()["state"] == "finished"
    assert capsys.readouterr().out.count("the tracker tensorboard failed (OSError); the run goes on without it") == 1


def test_a_refused_site_is_told_with_its_reason(tmp_path, monkeypatch):
    federation = Federation(tmp_path, tracker="tensorboard", sample_prompts="", min_sites=1)
    federation.grid.tamper = spoil_from("1")
    events = read(federation.go(monkeypatch))
    assert scalars(events, "round/refused") == [(1, 1.0), (2, 1.0)]
    assert b"HUB-05" in events.Tensors("refused/text_summary")[0].tensor_proto.string_val[0]


def test_a_credential_comes_from_the_environment_or_a_file_and_is_written_nowhere(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("a-secret-key\n")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracking.read_secrets("wandb")
    assert os.environ.pop("WANDB_API_KEY") == "a-secret-key"
    monkeypatch.setenv("WANDB_API_KEY", "another")
    tracking.read_secrets("wandb")
    assert os.environ["WANDB_API_KEY"] == "another"
    federation = Federation(tmp_path / "run", tracker="tensorboard", sample_prompts="", rounds=1)
    run = federation.go(monkeypatch)
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"a-secret-key" not in written and b"another" not in written
    assert json.loads((run / "history.json").read_text())["config"]["tracker"] == "tensorboard"


def test_in_a_fresh_process_a_tracker_that_logs_when_it_begins_can(tmp_path):
    """As accelerate's wandb and trackio do; accelerate refuses it before it knows its processes."""
    code = f"""
from pathlib import Path
from accelerate import tracking as theirs
from app.hub import tracking
from app.config import RunConfig

class Loud(theirs.TensorBoardTracker):
    main_process_only = False
    def start(self):
        theirs.logger.debug("begun")
        super().start()

theirs.LOGGER_TYPE_TO_CLASS["tensorboard"] = Loud
tracking.start(RunConfig.read({{"tracker": "tensorboard"}}), Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=PATIENT)
