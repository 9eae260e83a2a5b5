"""Was joining worth it? One sentence a site, from equal training steps and several seeds; "no" when the answer is no.

Enters: the comparison in a run's folder (comparison.py, made by bouquet worth). `loss` is the fixed-noise loss on the
site's own held-out photos, less is better; `judge`, where there is one, the share of pictures that show what was asked
for; `pooled` is there only where data may be pooled.
Leaves: `Verdict`s. The functions are pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bouquet.report.comparison import CONTENDERS, Measured, Worth

WORDS = {"base": "the base model", "alone": "training alone"}
# Student's t for a two-sided 95 % interval, by degrees of freedom (seeds − 1); beyond the table, the normal 1.96.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Verdict:
    """`answer` is yes, no, partly, not shown (the seeds differ more than the contenders) or cannot tell (one seed)."""

    site: str
    answer: str
    sentence: str


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % confidence interval; None for the width of a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def answer(mean: float, half: float | None) -> str:
    """For a gain: positive is good."""
    if half is None:
        return "cannot tell"
    return "yes" if mean - half > 0 else "no" if mean + half < 0 else "not shown"


def together(answers: Sequence[str]) -> str:
    """One answer from the loss's and the judge's."""
    found = set(answers)
    if {"yes", "no"} <= found:
        return "partly"
    return next(word for word in ("yes", "no", "not shown", "cannot tell") if word in found)


def best_without(values: Mapping[str, Sequence[float]], less_is_better: bool) -> str:
    """What a site has if it does not join: its own training, or the base model where that is better."""
    means = {name: statistics.fmean(values[name]) for name in ("alone", "base") if values.get(name)}
    return (min if less_is_better else max)(means, key=lambda name: means[name])


def verdict(site: str, measured: Measured) -> Verdict:
    """The federated adapter against the best that the site has without joining, paired by seed."""
    loss, judge = measured.loss, measured.judge
    rival = best_without(loss, less_is_better=True)
    gains = [(old - new) / old for old, new in zip(_each(loss[rival], loss), loss["federated"], strict=True)]
    mean, half = interval(gains)
    answers = [answer(mean, half)]
    counted = f"{len(gains)} seed{'s' * (len(gains) > 1)}"
    words = (
        f"on its own {measured.held_out} held-out photos the federated adapter's loss is {abs(mean):.1%}"
        f" {'lower' if mean >= 0 else 'higher'} than with {WORDS[rival]} ({_span(mean, half, counted)})"
    )
    if judge:
        rival = best_without(judge, less_is_better=False)
        old, new = _each(judge[rival], judge), judge["federated"]
        points = [100 * (b - a) for a, b in zip(old, new, strict=True)]
        mean, half = interval(points)
        answers.append(answer(mean, half))
        words += (
            f", and the judge sees what was asked for in {statistics.fmean(new):.0%} of its pictures against"
            f" {statistics.fmean(old):.0%} with {WORDS[rival]}"
        )
        words += (
            f" (95 % interval of the difference {mean - half:+.0f} to {mean + half:+.0f} points)"
            if half is not None
            else ""
        )
    found = together(answers)
    head = {
        "yes": "Yes",
        "no": "No",
        "partly": "Partly",
        "not shown": "Not shown",
        "cannot tell": "Cannot tell from one seed",
    }[found]
    return Verdict(
        site,
        found,
        f"{head}: {words}.".replace("%", " %").replace("  %", " %").replace("-", "−").replace("held−out", "held-out"),
    )


def verdicts(worth: Worth) -> list[Verdict]:
    """One for each site, by name."""
    return [verdict(site, measured) for site, measured in sorted(worth.sites.items())]


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
