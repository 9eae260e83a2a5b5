"""Was joining worth it? One sentence a site, from equal training steps and several seeds; "no" when the answer is no.

Enters: the comparison in a run's folder (comparison.py, made by bouquet worth). `loss` is the fixed-noise loss on the
site's own held-out photos, less is better; `others`, where sites evaluate what the others trained alone, that of theirs
on these photos; `judge`, where there is one, the share of pictures that show what was asked for; `pooled` is there only
where data may be pooled, `personal` where the site has trained the federated adapter on, at home.
So a site has two halves: its own photos, and the others', which are all that they held out, as one pile.
Leaves: `Verdict`s. The functions are pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bouquet.report.comparison import CONTENDERS, Measured, Numbers, Worth

WORDS = {"base": "the base model", "alone": "training alone"}
HEADS = {
    "yes": "Yes",
    "no": "No",
    "partly": "Partly",
    "tie": "A tie",
    "not shown": "Not shown",
    "cannot tell": "Cannot tell from one seed",
}
OWN, OTHERS = "own", "others"
TIE = 0.01  # share of a loss: where the whole interval is nearer to none than this, the difference is none
# Student's t for a two-sided 95 % interval, by degrees of freedom (seeds − 1); then its last: a little wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Half:
    """How much lower one contender's loss is than that of the best that the site has without joining, on one half of
    the photos; as a share of it, paired by seed.
    """

    who: str  # federated, personal or pooled
    where: str  # OWN or OTHERS
    rival: str  # alone or base
    photos: int
    seeds: int
    gain: float
    band: float | None  # half the width of its 95 % interval: what seeds, and rounding, do; None with one seed
    answer: str

    @property
    def size(self) -> str:
        """'11.0 % lower than with training alone (95 % interval ..., 3 seeds)'."""
        counted = f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        way = "lower" if self.gain >= 0 else "higher"
        return f"{abs(self.gain):.1%} {way} than with {WORDS[self.rival]} ({_span(self.gain, self.band, counted)})"

    @property
    def aside(self) -> str:
        """What follows on the size where it says neither yes nor no."""
        return {"tie": ", a tie", "not shown": ", which is not shown"}.get(self.answer, "")


@dataclass(frozen=True)
class Verdict:
    """`answer` is yes, no, partly, tie, not shown (the seeds differ more than the contenders) or cannot tell (one
    seed). `halves`: the federated adapter's, then those of who else was measured.
    """

    site: str
    answer: str
    sentence: str
    halves: tuple[Half, ...] = ()


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % confidence interval; None for the width of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, T95[min(len(values) - 2, len(T95) - 1)] * statistics.stdev(values) / math.sqrt(len(values))


def answer(mean: float, half: float | None, tie: float = TIE) -> str:
    """For a gain: positive is good. A tie is an interval around 0 that ends before `tie` on either side."""
    if half is None:
        return "cannot tell"
    if abs(mean) > half:
        return "yes" if mean > 0 else "no"
    return "tie" if abs(mean) + half < tie else "not shown"


def together(answers: Sequence[str]) -> str:
    """One answer from several: of the halves' losses, and of the judge."""
    found = set(answers)
    if {"yes", "no"} <= found:
        return "partly"
    return next(word for word in ("yes", "no", "not shown", "tie", "cannot tell") if word in found)


def best_without(values: Mapping[str, Sequence[float]], less_is_better: bool) -> str:
    """What a site has if it does not join: its own training, or the base model where that is better."""
    means = {name: statistics.fmean(values[name]) for name in ("alone", "base") if values.get(name)}
    return (min if less_is_better else max)(means, key=lambda name: means[name])


@dataclass(frozen=True)
class Pile:
    """Photos, each contender's loss on them by seed, and by how much that may be off, as it was rounded."""

    photos: int
    loss: Numbers
    off: Numbers

    @classmethod
    def of(cls, measured: Measured, loss: Numbers) -> Pile:
        off = {who: tuple(_rounding(value, measured.digits) for value in values) for who, values in loss.items()}
        return cls(measured.held_out, loss, off)


def elsewhere(site: str, sites: Mapping[str, Measured]) -> Pile | None:
    """What the others held out, those of them that have evaluated what this site trained alone, as one pile: a photo
    counts as much as any other. None where nobody has.
    """
    there = [found for name, found in sites.items() if name != site and found.others and site in found.others]
    if not there:
        return None
    piles = [Pile.of(found, _whole(found) | {"alone": (found.others or {})[site]}) for found in there]
    total = sum(pile.photos for pile in piles)
    everywhere = [who for who in CONTENDERS if who != "personal" and all(who in pile.loss for pile in piles)]

    def mean(tables: Sequence[Numbers]) -> Numbers:
        by_seed = {who: zip(*(table[who] for table in tables), strict=True) for who in everywhere}
        return {
            who: tuple(sum(p.photos * v for p, v in zip(piles, row, strict=True)) / total for row in rows)
            for who, rows in by_seed.items()
        }

    return Pile(total, mean([pile.loss for pile in piles]), mean([pile.off for pile in piles]))


def halves(site: str, sites: Mapping[str, Measured]) -> tuple[Half, ...]:
    """What was measured of a site: the federated adapter and pooling on both halves, the personal one on its own."""
    own, far = sites[site], elsewhere(site, sites)
    found = [(OWN, Pile.of(own, _whole(own)))] + ([(OTHERS, far)] if far else [])
    return tuple(
        _half(who, where, pile)
        for who in ("federated", "personal", "pooled")
        for where, pile in found
        if who in pile.loss
    )


def _half(who: str, where: str, pile: Pile) -> Half:
    """Its interval is that of the seeds, and by as much wider as the rounding of both losses may hide."""
    rival = best_without(pile.loss, less_is_better=True)
    pairs = list(zip(pile.loss[rival], pile.loss[who], strict=True))
    gain, band = interval([(old - new) / old for old, new in pairs])
    if band is not None:
        off = zip(pairs, pile.off[rival], pile.off[who], strict=True)
        band += statistics.fmean((of_new + of_old * new / old) / old for (old, new), of_old, of_new in off)
    return Half(who, where, rival, pile.photos, len(pairs), gain, band, answer(gain, band))


def _rounding(value: float, digits: int | None) -> float:
    """By how much a number may have been changed that was rounded to so many significant digits."""
    return 0.5 * 10.0 ** (math.floor(math.log10(value)) - digits + 1) if digits else 0.0


def verdict(site: str, sites: Mapping[str, Measured]) -> Verdict:
    """The federated adapter against the best that the site has without joining, on its own photos and the others'."""
    found = halves(site, sites)
    joined = [half for half in found if half.who == "federated"]
    answers, clauses = [half.answer for half in joined], []
    for half in joined:
        told = half.aside if len(joined) > 1 else ""
        if half.where == OWN:
            clauses.append(
                f"on its own {half.photos} held-out photos the federated adapter's loss is {half.size}{told}"
            )
        else:
            clauses.append(f"on the others' {half.photos} it is {half.size}{told}")
    if sites[site].judge:
        judged, words = _judged(sites[site])
        answers, clauses = [*answers, judged], [*clauses, words]
    total = together(answers)
    text = f"{HEADS[total]}{_paying(joined, total)}: {', and '.join(clauses)}.{_beside(found)}"
    return Verdict(site, total, text.replace("%", " %").replace("  %", " %"), found)


def verdicts(worth: Worth) -> list[Verdict]:
    """One for each site, by name."""
    return [verdict(site, worth.sites) for site in sorted(worth.sites)]


def _paying(joined: Sequence[Half], total: str) -> str:
    """Which half pays, where both are known and one does."""
    pays = [half.where for half in joined if half.answer == "yes"]
    if len(joined) < 2 or not pays or total not in ("yes", "partly"):
        return ""
    return ", by both halves" if len(pays) > 1 else {OWN: ", by its own half", OTHERS: ", by the others' half"}[pays[0]]


def _beside(found: Sequence[Half]) -> str:
    """A sentence about a tail at home; and one about pooling, where even that would lose on the site's own photos."""
    own, text = {half.who: half for half in found if half.where == OWN}, ""
    if personal := own.get("personal"):
        text += f" Trained on at home, on its own photos it is {personal.size}{personal.aside}."
    if (pooled := own.get("pooled")) and pooled.answer == "no":
        also = " as well" if own["federated"].answer == "no" else ""
        text += f" Pooling all photos would lose on its own{also}: {pooled.size}."
    return text


def _judged(measured: Measured) -> tuple[str, str]:
    """The judge's answer, and its words."""
    assert measured.judge is not None
    rival = best_without(measured.judge, less_is_better=False)
    old, new = _each(measured.judge[rival], measured.judge), measured.judge["federated"]
    points = [100 * (b - a) for a, b in zip(old, new, strict=True)]
    mean, half = interval(points)
    words = (
        f"the judge sees what was asked for in {statistics.fmean(new):.0%} of its pictures against"
        f" {statistics.fmean(old):.0%} with {WORDS[rival]}"
    )
    if half is not None:
        words += f" (95 % interval of the difference {mean - half:+.0f} to {mean + half:+.0f} points)".replace("-", "−")
    return answer(mean, half, 100 * TIE), words


def table(measured: Measured) -> list[dict[str, str]]:
    """A row for each contender that was measured: mean and half its 95 % interval, of the loss and of the judge's
    share.
    """
    rows = []
    for name in CONTENDERS:
        if values := measured.loss.get(name):
            judged = (measured.judge or {}).get(name)
            rows.append(
                {
                    "name": name,
                    "loss": _shown(values, "{:.4f}", 1),
                    "judge": _shown(judged, "{:.0f}", 100) if judged else "",
                }
            )
    return rows


def _shown(values: Sequence[float], form: str, scale: float) -> str:
    mean, half = interval(values)
    return form.format(mean * scale) + (f" ± {form.format(half * scale)}" if half is not None else "")


def _whole(measured: Measured) -> Numbers:
    """The losses, with one value a seed."""
    return {who: tuple(_each(values, measured.loss)) for who, values in measured.loss.items()}


def _each(values: Sequence[float], all_values: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """One value a seed: what does not depend on the seed may be given once."""
    return list(values) * len(all_values["federated"]) if len(values) == 1 else values


def _span(mean: float, half: float | None, counted: str) -> str:
    """'95 % interval 1.9 % to 4.3 % lower, 3 seeds'; where it has both signs, each end with its own word."""
    if half is None:
        return f"{counted}: no interval"
    ends = sorted((mean - half, mean + half), key=abs)
    if (ends[0] >= 0) == (ends[1] >= 0):
        side = "lower" if mean >= 0 else "higher"
        return f"95 % interval {abs(ends[0]):.1%} to {abs(ends[1]):.1%} {side}, {counted}"
    return f"95 % interval {abs(mean - half):.1%} higher to {abs(mean + half):.1%} lower, {counted}"
