"""What a site's photos have given away and what a run would cost them, before it joins: `bouquet site privacy`.

Enters: the site's environment as the preflight reads it (SITE_PRIVACY, folders, limits), a planned run's config.
Leaves: sentences. Nothing is trained, spent or sent; a base model is looked at where one is at hand.
Errors: those of the folder and of budget.py.
"""

from __future__ import annotations

import math
from pathlib import Path

from app import bases, families, model
from app.config import RunConfig
from app.errors import ModelError
from app.site import budget, privacy
from app.site.accountant import Terms
from app.site.limits import Limits
from app.site.photos import data

# how much of what a run without noise gains was kept, by the run's signal in units of its noise: two sites of 200 drawn
# flowers, 120 steps of 16, clipped at the median length (docs/security.md)
KEPT = ((0.22, "two fifths or more"), (0.11, "a quarter to two fifths"))


def told(
    promise: budget.Promise | None, config: RunConfig, folder: Path, cached: Path, limits: Limits, models: Path
) -> list[str]:
    """In words. Errors: SITE-01, SITE-02, TRUST-03, TRUST-16, TRUST-17, TRUST-18."""
    if promise is None:
        return [
            "SITE_PRIVACY is not set: this site promises nothing of a single photo; docs/security.md says what that is"
        ]
    photos = trained_on(folder, cached, limits, config)
    terms = promise.terms(config, photos)
    paid, now = budget.spent(cached), budget.epsilon(cached, promise.delta)
    steps = config.rounds * config.local_steps
    needed = budget.epsilon(cached, promise.delta, terms.steps(steps))
    lines = [
        f"photos    {photos} to train on; the hub is told of {terms.photos}",
        f"promise   epsilon {promise.epsilon:g} at delta {promise.delta:g}, of each photo, in all runs together",
        f"spent     epsilon {now:.2f}, in {len(paid)} rounds of {len({entry.get('run') for entry in paid})} runs",
        *not_covered(cached),
        f"a run     of {config.rounds} rounds of {config.local_steps} steps of {terms.images} photos, noise"
        f" {terms.noise:g}, clip {terms.clip:g}: epsilon {needed:.2f} by its end",
    ]
    if needed <= promise.epsilon:
        lines.append(f"fits      {promise.epsilon - needed:.2f} would be left")
    else:
        most = most_steps(cached, promise, terms, steps) // config.local_steps
        lines.append(
            f"too much  it is refused (TRUST-15); {most} such rounds fit" if most else "too much  not one round fits"
        )
    return lines + worth(config, terms, steps, models)


def not_covered(cached: Path) -> list[str]:
    """What left before there was a promise, or while it was off. Errors: TRUST-17."""
    if not (count := budget.without_noise(cached)):
        return []
    return [
        f"before    {count} rounds left without noise, before this promise or while it was off: neither the promise nor"
        " what is spent is about them"
    ]


def trained_on(folder: Path, cached: Path, limits: Limits, config: RunConfig) -> int:
    """How many of a folder's photos a run trains on; where there is no secret yet, about as many."""
    partition = data.scan(folder, memory=cached)
    some = (
        privacy.of(folder, partition.photos, cached, privacy.Secret.KEPT) if (cached / privacy.FILE).exists() else None
    )
    public = privacy.is_public(folder, partition.photos)
    some = some or (privacy.PUBLIC if public else privacy.Privacy(bytes(32)))
    rules = (limits if public else limits.private()).silent()
    train, _ = privacy.divide(partition, some, rules, config, each=True)
    return int(some.number(len(train)))


def most_steps(cached: Path, promise: budget.Promise, terms: Terms, high: int) -> int:
    """The most steps below `high` that the promise has room for."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        fits = budget.epsilon(cached, promise.delta, terms.steps(middle)) <= promise.epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def worth(config: RunConfig, terms: Terms, steps: int, models: Path) -> list[str]:
    """Whether a run learns anything under that noise: a rule of thumb."""
    try:
        base = bases.locate(config.base_model, models)
        families.check(base)
        numbers = sum(value.numel() for value in model.new_adapter(base, config).values())
    except ModelError:
        return ["sense     not known: the base model is not here"]
    noise = terms.noise * math.sqrt(numbers) / min(terms.images, terms.photos)
    signal = math.sqrt(steps) / noise
    kept = next((words for least, words in KEPT if signal >= least), "less than a quarter")
    return [
        f"sense     a step's noise is {noise:.0f} times as long as all that its photos can say; over {steps} steps the"
        f" signal is {signal:.2f} of the noise, at which {kept} of what a run without noise learns was kept",
        "          more photos allow larger batches and more steps at the same epsilon; a lower lora-rank has less"
        " noise",
    ]
