"""Runs as the report reads them, made by hand: a history, a `Run`, and a run's folder on a disk."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from app import records
from app.adapter import sample
from app.hub.history import History, Status
from bouquet.report import reading
from bouquet.report.comparison import Measured

PROMPTS = "a red poppy, meadow background|a white lily, night background"
HOSTILE = "<script>alert(1)</script>"
REASON = "HUB-05  The reply's metrics are missing or impossible."


def history(
    rounds: int = 3, wanted: int = 3, state: str = "finished", losses: dict[str, list[float]] | None = None
) -> dict:
    """A run as server_app.py writes it: two sites of 60 and 40 images, whose validation losses are given after 0, 1,
    ... rounds.
    """
    losses = losses or {"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.40, 0.30, 0.26, 0.25]}
    images = dict(zip(losses, (60, 40, 50, 50), strict=False))
    total = sum(images.values())
    measured = min(rounds + 1, min(map(len, losses.values())))
    return {
        "run": "7",
        "state": state,
        "config": {
            "base_model": "mini",
            "rounds": wanted,
            "resolution": 64,
            "batch_size": 16,
            "local_steps": 10,
            "sample_prompts": PROMPTS,
        },
        "base": {"name": "mini", "fingerprint": "b" * 64},
        "versions": {"torch": "2.13.0"},
        "rounds": [
            {
                "round": n,
                "started_from": f"{n - 1:064x}",
                "adapter": f"{n:064x}",
                "train_loss": 0.2 / n,
                "seconds": 20.0,
                "sites": {
                    site: {
                        "num-examples": images[site],
                        "train-loss": 0.2 / n,
                        "validation-loss": losses[site][n - 1],
                        "seconds-encode": 1.0,
                        "seconds-load": 2.0,
                        "seconds-train": 8.0,
                    }
                    for site in losses
                },
                "refused": [],
            }
            for n in range(1, rounds + 1)
        ],
        "validation": [
            {
                "after_round": k,
                "weighted": sum(values[k] * images[s] for s, values in losses.items()) / total,
                "sites": {s: v[k] for s, v in losses.items()},
            }
            for k in range(measured)
        ],
        "seconds": 61.0,
    }


def a_run(told: dict, folder: Path = Path("/nowhere"), *, status: dict | None = None, **more) -> reading.Run:
    return reading.Run(folder, records.of(History, told), records.of(Status, status or {}), **more)


def written(folder: Path, told: dict, sheet: bool = False) -> Path:
    """The run's folder on a disk; with `sheet`, samples.png as app/adapter/sample.py draws it, a shade a row and a
    prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.json").write_text(json.dumps(told))
    if sheet:
        names = ["base", *(f"round {n}" for n in range(1, len(told["rounds"]) + 1))]
        rows = [[Image.new("RGB", (64, 64), (40 * y, 200 * x, 90)) for x in range(2)] for y in range(len(names))]
        sample.grid(rows, names, [text.strip() for text in PROMPTS.split("|")]).save(folder / "samples.png")
    return folder


def compared(alone, federated, base=(0.30,), **more) -> dict:
    """What a site measured, as worth.json has it."""
    return {"held_out": 20, "loss": {"base": list(base), "alone": alone, "federated": federated}} | more


def measured(alone, federated, **more) -> Measured:
    """The same as it is read."""
    return records.of(Measured, compared(alone, federated, **more))
