"""The numbers of a site's reply: the one list of their names, and the range in which each can be true.

A site sends these and the hub keeps these: a reply may hold anything, and what is kept stays in memory, in every
round's files and in the report. The number of images is the one that decides something, so what the hub makes of it is
said, in the same words in the run's output and in the report.
Enters: a reply's metrics. Leaves: the numbers that are kept, and how many were not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS = {  # why a file is set aside (quarantined), and what it means to a person
    "absent": "a list or table names it, and it is not in the folder",
    "address": "an address in a list or table, not a picture: nothing is fetched",
    "animated": "an animation, not a photo",
    "caption-unreadable": "its caption file is not text in UTF-8, or cannot be read",
    "changed": "its bytes are no longer those that were scanned",
    "duplicate": "the same bytes as a picture before it",
    "empty": "zero bytes",
    "format": "not PNG, JPEG or WebP by its content",
    "no-caption": "no caption, and no template to make one from",
    "not-a-picture": "neither a picture nor a list, table or caption of one",
    "outside": "a link or path that leads out of the data folder",
    "pointer": "Git LFS's pointer to the file, not the file: git lfs pull",
    "system": "hidden, or a computer's own: thumbnails, recycle bins, half a copy, a conflict (a folder counts as one)",
    "too-large": (
        "more than 50 million pixels (a JPEG in one scan: 200 million) or 200 MB, or packed so that reading "
        "it is the work of many photos"
    ),
    "undecodable": "the header or the pixels are damaged or cut off",
    "unreadable": "not a file, or this process may not read it",
    "unused-caption": "a caption without its picture, of a farther list, beyond the 16th, or in a file's second line",
}
NEEDED = ("num-examples", "train-loss", "validation-loss")
PRIVATE = ("num-examples", "dp-epsilon", "dp-delta")  # of a site with differential privacy, whose losses stay there
PHASES = ("start", "encode", "load", "evaluate", "train")  # of a message's work, in their order (train.Clock)
RANGES: dict[str, tuple[float, float]] = {
    "num-examples": (1, 10**9 - 1),
    "train-loss": (0, 1e6),  # a mean of squares of about 1
    "validation-loss": (0, 1e6),
    **{f"seconds-{phase}": (0, 1e7) for phase in PHASES},
    "gpu-peak-mib": (0, 1e8),
    "gpu-utilisation": (0, 100),
    "gpu-joules": (0, 1e12),
    "dp-epsilon": (0, 1e9),  # of one photo, spent on all that the site has sent under its promise, in all runs
    "dp-delta": (0, 1),
    "dp-noise": (0, 1e6),  # of this round, in units of the clip
    "captions-cut": (0, 10**9),  # captions of which the base model reads only the beginning
    "enlarged": (0, 10**9),  # photos smaller than what is trained on
    **{f"photos-{reason}": (0, 10**9) for reason in REASONS},
}
ADMITTED, SHARE = "admitted number", "largest-share"  # what may bound the images that a site counts for


def sane(metrics: Mapping[str, Any]) -> tuple[dict[str, int | float], int]:
    """(the known numbers that lie in their range, how many others there were); NaN lies in none, a yes is no number."""
    kept: dict[str, int | float] = {}
    for name, (low, high) in RANGES.items():
        value = metrics.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            kept[name] = value
    return kept, len(metrics) - len(kept)


def needed(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reply with these numbers must have."""
    return PRIVATE if "dp-epsilon" in numbers else NEEDED


def most_images(others: int, largest_share: float) -> int:
    """Images that a site may count for beside `others` of all other sites, to be `largest_share` of all at most.

    largest_share is at least a half, so that one site can exceed it and no two.
    """
    return 10**9 if largest_share >= 1 else max(1, int(largest_share / (1 - largest_share) * others + 1e-9))


def bounded(site: str, claimed: float, counted: float, bound: str) -> str:
    """A sentence about a site that says it has more images than it counts for."""
    why = {ADMITTED: "it was admitted with no more", SHARE: "one site may weigh no more (largest-share)"}
    return (
        f"{site} says that it has {claimed:,.0f} images and counts for {counted:,.0f}, since"
        f" {why.get(bound, 'the hub bounds it')}. If that is not what it has, bound it: bouquet hub admit NAME KEY.pub"
        " --images N"
    )
