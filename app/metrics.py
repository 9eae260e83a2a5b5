"""The numbers of a site's reply: the one list of their names, and the range in which each can be true.

A site sends these and the hub keeps these: a reply may hold anything, and what is kept stays in memory, in every round's
files and in the report. The number of images is the one that decides something, so what the hub makes of it is said, in the
same words in the run's output and in the report.
Enters: a reply's metrics. Leaves: the numbers that are kept, and how many were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.images import REASONS

NEEDED = ("num-examples", "train-loss", "validation-loss")
PHASES = ("start", "encode", "load", "evaluate", "train")  # of a message's work, in their order (train.Clock)
RANGES: dict[str, tuple[float, float]] = {
    "num-examples": (1, 10**9 - 1),
    "train-loss": (0, 1e6),  # a mean of squares of about 1
    "validation-loss": (0, 1e6),
    **{f"seconds-{phase}": (0, 1e7) for phase in PHASES},
    "gpu-peak-mib": (0, 1e8),
    "gpu-utilisation": (0, 100),
    "gpu-joules": (0, 1e12),
    "captions-cut": (0, 10**9),  # photos with a caption of which the base model reads only the beginning
    **{f"photos-{reason}": (0, 10**9) for reason in REASONS},
}
ADMITTED, SHARE = "admitted number", "largest-share"  # what may bound the images that a site counts for


def sane(metrics: Mapping[str, Any]) -> tuple[dict[str, int | float], int]:
    """(the known numbers that lie in their range, how many others there were); NaN lies in none, a yes is no number."""
    numbers = {name: value for name in RANGES if type(value := metrics.get(name)) in (int, float)}
    kept = {name: value for name, value in numbers.items() if RANGES[name][0] <= value <= RANGES[name][1]}
    return kept, len(metrics) - len(kept)


def bounded(site: str, claimed: float, counted: float, bound: str) -> str:
    """A sentence about a site that says it has more images than it counts for."""
    why = {ADMITTED: "it was admitted with no more", SHARE: "one site may weigh no more (largest-share)"}
    return (
        f"{site} says that it has {claimed:,.0f} images and counts for {counted:,.0f}, since {why.get(bound, 'the hub bounds it')}. "
        "If that is not what it has, bound it: scripts/hub admit NAME KEY.pub --images N"
    )
