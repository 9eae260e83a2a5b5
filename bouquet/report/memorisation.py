"""Does the adapter remember photos? Each site's distances in; a sentence a site, and what is suspicious, out.

Enters: `memory.json` in a run's folder (made by bouquet measure), for each site the sorted numbers of `samples` and of
`held_out` photos: near 0 is a copy of one training photo, 1 is near to all alike. Leaves: `Found`s. Errors:
MEASURE-02.

A sample is suspicious when its number is smaller than every held-out photo's. If samples were like held-out photos, n
samples and H photos would come in any order, and the s smallest would all be samples with probability n(n−1)…(n−s+1) /
(n+H)(n+H−1)…(n+H−s+1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.errors import BouquetError

RARE = 0.05


@dataclass(frozen=True)
class Found:
    """`chance` is the probability of as many suspicious samples, or more, where nothing is remembered; `rare` when it
    is small.
    """

    site: str
    suspicious: int
    chance: float
    rare: bool
    sentence: str


def need(true: object) -> None:
    """What a file must have. Errors: ValueError."""
    if not true:
        raise ValueError


def check(memory: Any) -> None:
    """Errors: MEASURE-02 unless every site has finite numbers of samples and of held-out photos."""
    try:
        for site in memory["sites"].values():
            need(isinstance(site["photos"], int) and isinstance(site["space"], str))
            for kind in ("samples", "held_out"):
                need(
                    site[kind]
                    and all(type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in site[kind])
                )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BouquetError(
            "MEASURE-02",
            found="a site's numbers are missing or impossible",
            fix="let the sites measure again: bouquet measure memory; or take memory.json out of the run's folder",
        ) from None


def chance(samples: int, held_out: int, suspicious: int) -> float:
    """Of at least that many suspicious samples by luck alone."""
    return math.prod((samples - i) / (samples + held_out - i) for i in range(suspicious))


def found(site: str, measured: dict[str, Any]) -> Found:
    samples, held_out = measured["samples"], measured["held_out"]
    count = suspicious(samples, held_out)
    luck = chance(len(samples), len(held_out), count)
    rare = count > 0 and luck < RARE
    if not count:
        words = (
            f"None of {len(samples)} samples is as near to a single training photo as the nearest of {len(held_out)}"
            " held-out photos is."
        )
    else:
        words = (
            f"{count} of {len(samples)} samples {'are' if count > 1 else 'is'} nearer to a single training photo than"
            f" any of {len(held_out)} held-out photos is; where nothing is remembered that happens with a probability"
            f" of {luck:.0%}. "
        )
        words += "Look at them at the site before the adapter goes out." if rare else "That is not unusual."
    return Found(site, count, luck, rare, words.replace("%", " %"))


def suspicious(samples: Sequence[float], held_out: Sequence[float]) -> int:
    """How many samples lie below every held-out photo."""
    return sum(value < min(held_out) for value in samples)


def all_found(memory: dict[str, Any]) -> list[Found]:
    """One for each site, by name."""
    check(memory)
    return [found(site, measured) for site, measured in sorted(memory["sites"].items())]
