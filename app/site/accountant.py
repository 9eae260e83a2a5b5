"""What steps of DP-SGD cost: epsilon of the sampled Gaussian mechanism, composed over whatever was done before.

A step takes each photo with probability `rate` by itself, cuts each taken photo's gradient to a length, and adds normal
noise of `noise` times that length to the sum. The unit is one photo that is there or not (add or remove one). Its
privacy loss is log P(x)/Q(x), P and Q being the two normal mixtures with and without that photo (Zhu, Dong, Wang 2022,
arXiv:2106.08567, theorem 11); both directions are composed, and the worse one counts. Losses are put on a grid so that
each interval keeps both of its probabilities, which can only make the two easier to tell apart: what comes out is
never too small but for float64's rounding (about 1e-12 of delta). dp-accounting's PLD accountant does the same
(Doroshenko et al. 2022, arXiv:2207.04380), and tests hold this one against it; it is no dependency, as it wants
versions that Bouquet's lock does not have (attrs before 24), and SciPy, for what is a page of NumPy.

Enters: steps by (rate, noise), a delta. Leaves: epsilon.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ROUNDING = 1e-15  # of float64, for each step that is composed
TAIL = 1e-13  # probability that is taken for lost, each time that something is cut off
FINE = 24  # grid points to the standard deviation of one step's loss
MOST = 2**19  # grid points, of which more are not finer but slower
erfc = np.frompyfunc(math.erfc, 1, 1)


class Steps(NamedTuple):
    """`number` steps of one kind. rate: a photo's chance to be in one; noise: the multiplier, in units of the clip."""

    rate: float
    noise: float
    number: int


class Terms(NamedTuple):
    """On what terms a round is trained.

    photos: of how many a step's batch is drawn, as told to the hub; not what is there. images: expected in a step.
    noise: in units of clip; clip: the most that one photo's gradient is long.
    """

    photos: int
    images: int
    noise: float
    clip: float

    @property
    def rate(self) -> float:
        """A photo's chance to be in a step."""
        return min(1.0, self.images / self.photos)

    def steps(self, number: int) -> Steps:
        """What so many steps are to the accountant."""
        return Steps(self.rate, self.noise, number)


@dataclass(frozen=True)
class Grid:
    """One step's losses: probability by k, of the loss (first + k) times the grid's width; and that of no bound."""

    first: int
    chances: Array
    infinite: float


def epsilon(done: Iterable[Steps], delta: float) -> float:
    """The least epsilon for which all of this is (epsilon, delta)-private; infinite without noise."""
    kinds: Counter[tuple[float, float]] = Counter()
    for rate, noise, count in done:
        if rate > 0 and count:
            kinds[rate, noise] += count
    if not kinds:
        return 0.0
    if any(noise <= 0 for _, noise in kinds):
        return math.inf
    return max(_epsilon(kinds, delta, remove) for remove in (True, False))


def _epsilon(kinds: Counter[tuple[float, float]], delta: float, remove: bool) -> float:
    """In one direction."""
    widest = max(top - bottom for bottom, top in (_ends(rate, noise, remove) for rate, noise in kinds))
    width = max(min(_spread(rate, noise) for rate, noise in kinds) / FINE, widest / MOST)
    while True:
        grids = [(_one(rate, noise, width, remove), count) for (rate, noise), count in kinds.items()]
        low, high = _reach(grids, width, -1), _reach(grids, width, 1)
        if high - low < MOST:
            break
        width *= 2 * (high - low) / MOST
    size = 2 ** math.ceil(math.log2(high - low + 2))
    product = np.ones(size // 2 + 1, complex)
    finite = 1.0
    for grid, count in grids:
        folded = np.bincount((grid.first + np.arange(len(grid.chances))) % size, grid.chances, size)
        product *= np.fft.rfft(folded) ** count
        finite *= (1 - grid.infinite) ** count
    ring = np.fft.irfft(product, size)
    numbers = low + np.arange(size)
    chances = np.clip(ring[numbers % size], 0, None)
    return _least(numbers * width, chances, delta, 1 - finite + 2 * TAIL + ROUNDING * sum(kinds.values()))


def _least(losses: Array, chances: Array, delta: float, lost: float) -> float:
    """The least epsilon >= 0 at which sum(p (1 - e^(epsilon - loss)), where loss > epsilon) + lost is delta or less."""
    above, weight = _sums(chances), _sums(chances * np.exp(-losses.clip(-500, 500)))
    deltas = lost + above[1:] - np.exp(losses.clip(-500, 500)) * weight[1:]  # at each grid point
    fits = np.flatnonzero(deltas <= delta)
    if not len(fits):
        return math.inf
    at = int(fits[0])  # between the grid's points the same photos' losses are above: the equation is solved as it is
    rest = above[at] + lost - delta
    return max(0.0, math.log(rest / weight[at]) if rest > 0 and weight[at] > 0 else 0.0)


def _sums(values: Array) -> Array:
    """By k, the sum from k on; and 0."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _reach(grids: list[tuple[Grid, int]], width: float, sign: int) -> int:
    """The grid point that the sum of all losses passes with a chance of TAIL at most (Chernoff's bound)."""
    best = math.inf
    scale = math.sqrt(sum(count * _moment(grid, width) for grid, count in grids))
    for slope in np.geomspace(0.05, 50, 25) / max(scale, 1e-12):
        total = 0.0
        for grid, count in grids:
            losses = sign * slope * width * (grid.first + np.arange(len(grid.chances)))
            top = float(losses.max())
            total += count * (top + math.log(float(grid.chances @ np.exp(losses - top))))
        best = min(best, (total - math.log(TAIL)) / slope)
    return sign * math.ceil(best / width + 1)


def _moment(grid: Grid, width: float) -> float:
    losses = width * (grid.first + np.arange(len(grid.chances)))
    return float(grid.chances @ losses**2)


def _spread(rate: float, noise: float) -> float:
    """About the standard deviation of one step's loss."""
    return rate * math.sqrt(math.expm1(min(1 / noise**2, 50))) if rate < 1 else 1 / noise


def _one(rate: float, noise: float, width: float, remove: bool) -> Grid:
    """One step's losses. remove: P has the photo and Q has not; else the other way round."""
    bottom, top = _ends(rate, noise, remove)
    first, last = math.floor(bottom / width), math.ceil(top / width)
    edges: Array = width * np.arange(first, last + 1, dtype=np.float64)
    at = _where(edges if remove else -edges, rate, noise)  # falls with the loss where nothing was removed
    without = _between(at, 0.0, noise)
    having = rate * _between(at, 1.0, noise) + (1 - rate) * without if rate < 1 else _between(at, 1.0, noise)
    ours, theirs = (having, without) if remove else (without, having)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (theirs[1:-1] / ours[1:-1] * np.exp(edges[1:]) - 1) / math.expm1(width)  # of it, at the lower end
    lower = ours[1:-1] * np.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0).clip(0, 1)
    chances = np.append(lower, 0.0) + np.append(0.0, ours[1:-1] - lower)
    chances[0] += ours[0]
    return Grid(first, chances, float(ours[-1]))


def _ends(rate: float, noise: float, remove: bool) -> tuple[float, float]:
    """Between which losses nearly all are; what is above counts as infinite, what is below as the lowest."""
    reach = noise * math.sqrt(-2 * math.log(TAIL))
    bottom, top = sorted((1 if remove else -1) * _loss(x, rate, noise) for x in (-reach, 1 + reach))
    return bottom, top


def _loss(x: float, rate: float, noise: float) -> float:
    """log of the density with the photo by the one without, at x."""
    ratio = (2 * x - 1) / (2 * noise**2)
    return ratio if rate == 1 else float(np.logaddexp(math.log1p(-rate), math.log(rate) + ratio))


def _where(losses: Array, rate: float, noise: float) -> Array:
    """The x at which `_loss` is this; minus infinity where it always is more."""
    if rate == 1:
        return losses * noise**2 + 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = -np.expm1(math.log1p(-rate) - losses)
        ratio = np.where(inner > 0, losses + np.log(np.where(inner > 0, inner, 1.0)) - math.log(rate), -np.inf)
    return ratio * noise**2 + 0.5


def _between(at: Array, mean: float, noise: float) -> Array:
    """A normal's chances before the first of these points, between each two and after the last; they rise or fall."""
    rises = at[-1] >= at[0]
    z = (at if rises else -at) - (mean if rises else -mean)
    z = z / (noise * math.sqrt(2))
    low, high = (
        np.asarray(erfc(side), dtype=np.float64) / 2 for side in (-z, z)
    )  # of below, of above; each small one is exact
    inner = np.where(z[1:] < 0, low[1:] - low[:-1], high[:-1] - high[1:])
    return np.concatenate([low[:1], inner.clip(0, None), high[-1:]])
