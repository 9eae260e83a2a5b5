"""What happens in a run, told to a tracker: TensorBoard, Weights & Biases, MLflow or Trackio, through accelerate's own
classes.

Enters: run-config `tracker`, and round by round what history.json gets. Leaves: by round, the losses, each site's
numbers, the lengths of the updates, how many replies were refused and why, seconds, GPU figures, and the sample
pictures. Nobody but the hub needs this. TensorBoard's files lie in `<run>/tracker`; the others take addresses and
credentials from the environment, or a credential from the file that NAME_FILE names there: none is ever in a run's
config, in history.json or in a log.
Errors: CONFIG-04 before the run starts. A tracker that fails later is left out; the run goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from app import text
from app.config import RunConfig
from app.errors import ConfigError
from app.hub.history import Round, Validation

PROJECT = "bouquet"
SECRETS = {
    "wandb": ("WANDB_API_KEY",),
    "mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    "trackio": ("HF_TOKEN",),
}
# how each is told which run it is; the first is the project's name
OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "tensorboard": lambda run: {"run_name": "", "logging_dir": str(run / "tracker")},
    "wandb": lambda run: {"run_name": PROJECT, "name": run.name, "dir": str(run)},
    "mlflow": lambda run: {"experiment_name": PROJECT, "run_name": run.name},
    "trackio": lambda run: {"run_name": PROJECT, "name": run.name},
}


def start(config: RunConfig, run: Path) -> Tracker:
    """The run's tracker, begun and told the run's config. Errors: CONFIG-04."""
    if config.tracker == "none":
        return Tracker(None)
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if config.tracker not in [str(known) for known in get_available_trackers()]:
        raise _unusable(
            config.tracker, "its package is not installed at the hub", f"install {config.tracker} at the hub"
        )
    try:
        PartialState(cpu=True)  # without it accelerate's trackers cannot log; the hub trains nothing
        read_secrets(config.tracker)
        tracker = LOGGER_TYPE_TO_CLASS[config.tracker](**OPTIONS[config.tracker](run))
        tracker.start()
        settings = asdict(config) | {"run": run.name}
        if config.tracker == "tensorboard":  # whose own way lists a second run, of no numbers
            tracker.log({"config": "\n".join(f"    {name}: {value}" for name, value in settings.items())}, step=0)
        else:
            tracker.store_init_configuration(settings)
    except Exception as error:  # each tracker's own; its text may hold an address with a password
        fix = "look at its address and credentials in the hub's environment"
        raise _unusable(config.tracker, f"{type(error).__name__} when it began", fix) from error
    return Tracker(tracker)


def read_secrets(tracker: str) -> None:
    """Each credential NAME that is unset from the file that NAME_FILE names. Errors: OSError."""
    for name in SECRETS.get(tracker, ()):
        if (file := os.environ.get(f"{name}_FILE")) and name not in os.environ:
            os.environ[name] = Path(file).read_text().strip()


class Tracker:
    """One run's tracker, or none. No call raises."""

    def __init__(self, tracker: Any) -> None:
        self.tracker, self.step = tracker, 0

    def validation(self, entry: Validation) -> None:
        """The arriving adapter's loss: an entry of history.json's `validation`."""
        by_site = {f"validation/{plain(site)}": loss for site, loss in entry.sites.items()}
        self._tell(lambda: self._log({"validation/all": entry.weighted} | by_site, entry.after_round))

    def round(self, entry: Round) -> None:
        """A round: an entry of history.json's `rounds`."""
        values = {
            "round/seconds": entry.seconds,
            "round/refused": len(entry.refused),
            "round/sites": len(entry.sites),
        }
        if entry.train_loss is not None:
            values["train/all"] = entry.train_loss
        if entry.aggregation_error is not None:
            values["round/aggregation error"] = entry.aggregation_error
        for site, part in entry.sites.items():
            numbers = {name: value for name, value in part.told().items() if type(value) in (int, float)}
            values |= {f"{place(name)}/{plain(site)}": value for name, value in numbers.items()}
        # indented, it is text to TensorBoard, which else makes links and pictures of it (Markdown)
        why = "\n".join(f"    {plain(no.site)}: {text.printable(no.reason)}" for no in entry.refused)
        self._tell(lambda: self._log(values, entry.round))
        if why and self.tracker and self.tracker.name != "mlflow":  # which keeps numbers alone
            self._tell(lambda: self._log({"refused": why}, entry.round))

    def pictures(self, number: int, prompts: Sequence[str], images: Sequence[Image.Image], file: Path) -> None:
        """A round's sample pictures, 0 for the base model's; `file` is the sheet of all of them so far."""
        self._tell(lambda: self._show(number, prompts, images, file))

    def close(self) -> None:
        self._tell(lambda: self.tracker.finish())
        self.tracker = None

    def _log(self, values: dict[str, Any], step: int) -> None:
        self.step = max(self.step, step)
        self.tracker.log(values, step=self.step)

    def _show(self, number: int, prompts: Sequence[str], images: Sequence[Image.Image], file: Path) -> None:
        import numpy as np

        match self.tracker.name:
            case "tensorboard":  # a slider over the rounds, for each prompt
                arrays = {
                    f"samples/{plain(p)}": np.asarray(image.convert("RGB"))[None]
                    for p, image in zip(prompts, images, strict=True)
                }
                self.tracker.log_images(arrays, step=number, dataformats="NHWC")
            case "wandb":  # takes no step that lies behind
                self.tracker.log_images({f"samples/round {number}": list(images)}, step=self.step)
            case "mlflow":
                self.tracker.log_artifact(str(file))
            case "trackio":
                import trackio

                shown = {
                    f"samples/{plain(p)}": trackio.Image(image, caption=f"round {number}")
                    for p, image in zip(prompts, images, strict=True)
                }
                self.tracker.log(shown, step=self.step)

    def _tell(self, call: Callable[[], None]) -> None:
        if self.tracker is None:
            return
        try:
            call()
        except Exception as error:  # a tracker is no reason to lose a run
            print(
                f"bouquet: the tracker {self.tracker.name} failed ({type(error).__name__}); the run goes on without it",
                flush=True,
            )
            self.tracker = None


def place(name: str) -> str:
    """A site's metric under the heading where one looks for it: seconds-train as `seconds train`, train-loss as
    `train`.
    """
    for prefix in ("seconds", "gpu", "photos"):
        if name.startswith(f"{prefix}-"):
            return f"{prefix} {name.removeprefix(f'{prefix}-')}"
    return {
        "train-loss": "train",
        "validation-loss": "validation before",
        "num-examples": "images",
        "update-norm": "norm",
    }.get(name, name)


def plain(name: str) -> str:
    """A name as every tracker takes it: letters, digits, and `_ - .` between them; never a path's `..`."""
    return re.sub(r"[^\w. -]+|\.{2,}|^[. ]+|[. ]+$", "_", name[:100]) or "_"


def _unusable(tracker: str, found: str, fix: str) -> ConfigError:
    return ConfigError("CONFIG-04", tracker=tracker, found=found, fix=f'{fix}, or run with tracker = "none"')
