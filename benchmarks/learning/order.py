"""Orders in which a site's photos come to its steps, other than the app's shuffle, for comparison.

Enters: which kind each photo is of. Leaves: while `ordered` lasts, a training that takes every photo once before any
twice, as ever, each time shuffled and then put in this order:
  even        every batch has its share of each kind
  known last  of each pass over the photos, those of kinds that the base knows come last
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from app.site import train


def arranged(shuffled: Tensor, kinds: Sequence[str], how: str, known: Sequence[str]) -> Tensor:
    """shuffled: the numbers of all photos. Those of one kind stay in their order."""
    numbers = shuffled.tolist()
    if how == "known last":
        return torch.tensor(sorted(numbers, key=lambda number: kinds[number] in known))
    of: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        of[kinds[number]].append(number)
    places = {number: (at + 0.5) / len(some) for some in of.values() for at, number in enumerate(some)}
    return torch.tensor(sorted(numbers, key=places.__getitem__))


def shuffled(kinds: Sequence[str], how: str, known: Sequence[str], count: int, generator: torch.Generator) -> Tensor:
    """As train._shuffled, in this order."""
    if count != len(kinds):
        raise ValueError(f"{count} photos come to the steps, and of {len(kinds)} it is known what they show")
    return arranged(torch.randperm(count, generator=generator), kinds, how, known)


@contextmanager
def ordered(how: str, kinds: Mapping[str, str], known: Sequence[str]) -> Iterator[None]:
    """kinds: by the hash of each photo of every site. "" leaves the shuffle as it is."""
    fit = train.fit

    def in_order(net: Any, objective: Any, encoded: Any, *rest: Any) -> float:
        mine = [kinds[key] for key in encoded.keys]
        with mock.patch.object(train, "_shuffled", partial(shuffled, mine, how, known)):
            return fit(net, objective, encoded, *rest)

    with mock.patch.object(train, "fit", in_order if how else fit):
        yield
