"""A site's personal adapter: the run's, and a falling tail on the site's own photos. It stays at the site.

  bouquet site personal RUN --data DIR --name NAME [--steps N] [--out DIR] [--models DIR] [--cache DIR]

Starts from the run's final adapter and takes N steps (without a word: as many as the tail has of the run's steps at one
site, a quarter), with the rate falling from the run's to 0 over all of them. The site's SITE_LIMITS hold as for the
run itself: what the site would not have taken part in is not trained on either. Where SITE_PRIVACY is set the steps
are trained with its noise and paid from its epsilon, as a round is: what lies in a folder gets handed on some day.
Enters: a finished run, the site's folder and cache. Leaves: DIR/RUN/final/ with the files that a run has (formats.py),
whose provenance.json says what was done here. Errors: EXPORT-01, -02, MODEL-04, those of getting a site ready,
TRUST-03, TRUST-15 to -18.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app import text
from app.errors import BouquetError
from app.hub import history
from app.hub.history import Personal

if TYPE_CHECKING:
    from app.config import RunConfig
    from app.model import Adapter


@dataclass(frozen=True)
class Trained:
    """The folder, and the loss on the site's held-out photos before and after."""

    folder: Path
    steps: int
    held_out: int
    before: float
    after: float

    @property
    def sentence(self) -> str:
        change = (self.after - self.before) / self.before
        told = f"{self.before:.4f} → {self.after:.4f} ({change:+.1%})".replace("%", " %").replace("-", "−")
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{steps} at home; loss on this site's {self.held_out} held-out photos {told}"


def of_run(folder: Path, run: Path) -> Path:
    """Where a site's personal adapter of a run lies."""
    return folder / run.resolve().name


def tail(config: RunConfig, steps: int) -> RunConfig:
    """So many steps, over all of which the rate falls; without a number, as many as a quarter of the run's."""
    from app.site import rate
    from bouquet.adapter import alone

    config = alone.by_itself(config)
    count = steps or max(1, config.rounds * config.local_steps // rate.LAST)
    return replace(config, rounds=1, local_steps=count, learning_rate_schedule="linear", warmup_steps=0)


def train(
    run: Path, name: str, data: Path, models: Path, cached: Path, out: Path, steps: int = 0,
    env: Mapping[str, str] = os.environ,
) -> Trained:  # fmt: skip
    """Train on from the run's adapter at the site `name`, and write the folder."""
    from app import bases, families, model
    from app.adapter import formats
    from app.site import budget, limits
    from app.site import train as training
    from bouquet.adapter import publish

    adapter, config = formats.open_adapter(run, models=models)
    base = bases.locate(config.base_model, models)
    provenance = history.read_provenance(run / "final" / history.PROVENANCE)
    publish.check_origin(run / "final", adapter, base, provenance)
    own, promise = limits.Limits.read(env.get("SITE_LIMITS", "")), budget.of(env, cached)
    own.check(config)
    if limits.wants_checkpointing(env):
        config = replace(config, gradient_checkpointing=True)
    site = training.Site(config, models, data, cached, "", limits=own, promise=promise)
    started_from = model.apply_adapter(site.net, adapter)
    before = site.evaluate()
    site.config = site.fits = shorter = tail(config, steps)
    if promise and (terms := site.terms):
        budget.spend(cached, promise, terms, shorter, f"personal {started_from[:16]}", 1)
        site.fit_privately(terms)
    else:
        site.fit(site.privacy.seed(config.seed, name, "personal"))
    made = model.adapter_of(site.net)
    after, held_out = site.evaluate(), len(site.held_out.keys)
    told = replace(
        provenance,
        adapter_sha256=model.adapter_hash(made),
        privacy=None,  # what was promised of the run's adapter says nothing of this one
        personal=Personal(name, shorter.local_steps, started_from),
    )
    folder = formats.write_final(of_run(out, run), made, config, families.of(base), told)
    return Trained(folder, shorter.local_steps, held_out, before, after)


def read(folder: Path, run: Path, federated: Adapter) -> Adapter:
    """The personal adapter of a run, among those in a folder. Errors: WORTH-03 unless it was trained on from the run's,
    EXPORT-02, REPORT-02.
    """
    from app import model
    from app.adapter import formats, store

    final = formats.adapter_file(of_run(folder, run)).parent
    told = history.read_provenance(final / history.PROVENANCE).personal
    if told is None or told.started_from != model.adapter_hash(federated):
        found = text.line(f"{final} was not trained on from {run}")
        raise BouquetError("WORTH-03", found=found, fix="make it: bouquet site personal")
    return store.read_adapter(final)
