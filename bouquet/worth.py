"""Was joining worth it? Each site measures its own column, at the site; the hub puts the columns together.

  bouquet worth measure NAME --data DIR RUN... [--models DIR] [--cache DIR] [--pool DIR...] [--judge COUNT]
  [--pictures] [--out FILE]
  bouquet worth collect RUN COLUMN...

measure   at the site NAME: trains alone on its photos, with the steps and seeds of the RUNs, which are alike but for
          their seed, and compares the base, its own and each run's adapter on its held-out photos. Only numbers are in
          FILE (default: NAME.worth.json). --pool, where photos may be pooled, adds a training on all of them with all
          sites' steps. --judge, for the demo's base model, adds the share of COUNT pictures a species in which the
          judge sees what was asked for. Photos that are private need the site's own cache folder, where its secret is,
          and its SITE_LIMITS. --pictures draws the first RUN's prompts under each contender, from the same seeds, into
          FILE's .png: look at it, and send it along if you agree to it being shown.
collect   at the hub: worth.json in RUN's folder, for bouquet report; a picture that lies beside a COLUMN comes along.

Errors: WORTH-01 (runs that cannot be compared), WORTH-02 (columns that do not fit each other).
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.adapter import store
from app.config import RunConfig
from app.errors import BouquetError, ConfigError
from app.hub import history
from app.hub.history import History
from app.site import budget
from app.site.limits import Limits
from bouquet import progress
from bouquet.report import comparison, pictures, worth
from bouquet.report.comparison import Column, Measured, Worth

if TYPE_CHECKING:
    from app.model import Adapter
    from app.site.train import Site


FORMER = {"learning_rate_schedule": "constant"}  # what runs did before they could say it


def measure_to_file(
    out: Path,
    name: str,
    data: Path,
    runs: list[Path],
    models: Path,
    cache: Path | None,
    pool: list[Path],
    judge: int,
    pictures: bool,
) -> None:
    """A site's column in its file, with `pictures` a sheet beside it; a sentence about it on standard output."""
    with tempfile.TemporaryDirectory() as scratch:
        cached = cache or Path(scratch) / "cache"
        shown = out.with_suffix(".png") if pictures else None
        column = measure(name, data, runs, models, cached, pool, judge, shown)
    comparison.write(out, column)
    if shown:
        print(f"picture  {shown}   look at it; it goes to the hub only if you send it along")
    print(worth.verdict(column.site, measured_of(column)).sentence)


def alike(runs: list[Path]) -> list[RunConfig]:
    """Each run's configuration, in the order of the runs. Errors: WORTH-01 unless they differ in their seed, and in
    that alone.
    """
    histories = [history.read(run / history.FILE) for run in runs]
    configs = [config_of(told, run) for told, run in zip(histories, runs, strict=True)]
    same = {replace(config, seed=0) for config in configs}
    bases = {told.base and told.base.fingerprint for told in histories}
    whole = all(told.state == "finished" for told in histories)
    if len(same) > 1 or len(bases) > 1 or len({config.seed for config in configs}) < len(configs) or not whole:
        raise BouquetError(
            "WORTH-01",
            found=", ".join(
                f"{run.name}: {h.state}, seed {c.seed}" for run, h, c in zip(runs, histories, configs, strict=True)
            ),
            fix="give finished runs that are alike but for their seed: --run-config 'seed=43'",
        )
    return configs


def config_of(told: History, run: Path) -> RunConfig:
    """A run's configuration, as this version knows it. Errors: WORTH-01."""
    try:
        return RunConfig.read({key.replace("_", "-"): v for key, v in (FORMER | told.config).items()}, ended=True)
    except ConfigError as error:
        fix = "compare runs of this version"
        raise BouquetError("WORTH-01", found=f"{run.name}: {error}", fix=fix) from None


def measure(
    name: str,
    data: Path,
    runs: list[Path],
    models: Path,
    cached: Path,
    pool: list[Path],
    judge: int,
    shown: Path | None = None,
) -> Column:
    """One site's column of worth.json; and in the file `shown` what each contender of the first run draws."""
    from app import bases, model
    from app.adapter import sample
    from app.site import train

    contenders = [contender for contender in comparison.CONTENDERS if pool or contender != "pooled"]
    loss: dict[str, list[float]] = {contender: [] for contender in contenders}
    judged: dict[str, list[float]] = {contender: [] for contender in loss}
    configs, own = alike(runs), Limits.read(os.environ.get("SITE_LIMITS", ""))
    base, held_out = bases.locate(configs[0].base_model, models), []
    for run, config in zip(runs, configs, strict=True):
        # of whom nothing is sent here; who is held out is as in the run
        # whoever trains alone has no half to leave to others
        config = replace(config, strategy="fedavg") if config.strategy == "alternate" else config
        site = train.Site(config, models, data, cached, "", limits=own, promise=budget.of(os.environ, cached))
        held_out.append(len(site.held_out.keys))
        fresh = model.new_adapter(base, config)
        adapters = {
            "base": fresh,
            "alone": alone(site, fresh, name),
            "federated": store.read_adapter(run / "final"),
        }
        if pool:
            adapters["pooled"] = pooled(site, fresh, [data, *pool], models)
        for contender, adapter in adapters.items():
            model.apply_adapter(site.net, adapter)
            loss[contender].append(site.privacy.number(site.evaluate()))
            if judge:
                judged[contender].append(right(base, None if contender == "base" else adapter, config, judge))
        if shown and run == runs[0]:
            sample.sheet(
                base, {who: None if who == "base" else adapter for who, adapter in adapters.items()}, config
            ).save(shown)
        print(
            f"seed {config.seed}  " + "  ".join(f"{who} {values[-1]:.4f}" for who, values in loss.items()), flush=True
        )
    steps = configs[0].rounds * configs[0].local_steps
    numbers = [{who: tuple(values) for who, values in kind.items()} for kind in (loss, judged)]
    seeds = tuple(config.seed for config in configs)
    return Column(name, seeds, min(held_out), numbers[0], numbers[1] if judge else None, steps)


def pooled(site: Site, start: Adapter, folders: list[Path], models: Path) -> Adapter:
    """What one training on all sites' photos makes, with all their steps; without those that this site held out."""
    from app.site import train

    with tempfile.TemporaryDirectory() as scratch:
        aside = site.held_out.keys if site.privacy.private else ()
        photos = together(folders, Path(scratch) / "photos", aside)
        longer = replace(site.config, rounds=site.config.rounds * len(folders))
        return alone(train.Site(longer, models, photos, Path(scratch) / "cache", ""), start, "pooled")


def measured_of(column: Column, picture: str = "") -> Measured:
    """A site's column as worth.json has it."""
    return Measured(column.held_out, column.loss, column.judge, picture)


def alone(site: Site, start: Adapter, name: str) -> Adapter:
    """All rounds of the site's config without a hub, by the seeds that the site has in the run: round 1 is the run's
    own. The learning rate falls over the steps of all of them: a contender that was spared it would lose by its noise.
    """
    from app import model

    model.apply_adapter(site.net, start)
    rounds = range(1, site.config.rounds + 1)
    for number in progress.steps(f"{name} alone, seed {site.config.seed}", rounds):
        site.fit(site.privacy.seed(site.config.seed, name, number), number)
    return model.adapter_of(site.net)


def together(folders: list[Path], target: Path, aside: Collection[str] = ()) -> Path:
    """All photos and captions in one folder, but for those set aside by their keys.

    Where photos are public one is held out by its bytes, so that the same ones are held out here; those that a site
    with private photos has held out by its secret are set aside. Whoever may read this folder has all of it: no hub
    asks about it.
    """
    from app.site import privacy
    from app.site.photos import data

    target.mkdir()
    lines = []
    for number, folder in enumerate(folders):
        for photo in data.scan(folder).photos:
            if photo.key in aside:
                continue
            file = f"{number}-{photo.key}{Path(photo.name).suffix or '.png'}"
            (target / file).write_bytes(photo.load())
            lines.append(json.dumps({"file_name": file, "text": photo.captions}))
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    privacy.declare_public(target, data.scan(target).photos)
    return target


def right(base: Path, adapter: Adapter | None, config: RunConfig, count: int) -> float:
    """The mean share, over all species, of pictures in which the demo's judge sees what was asked for."""
    from app.adapter import sample
    from models.mini import compare

    return statistics.fmean(compare.score(sample.pipeline(base, config), adapter, config, count).values())


def collect(run: Path, files: list[Path]) -> Path:
    """worth.json in the run's folder. Errors: WORTH-02 unless the columns have the same seeds and steps, REPORT-04."""
    columns = [comparison.read_column(file) for file in files]
    alike = {(column.seeds, column.steps) for column in columns}
    if len(alike) > 1 or len({column.site for column in columns}) < len(columns):
        raise BouquetError(
            "WORTH-02",
            found=", ".join(f"{c.site}: seeds {list(c.seeds)}, {c.steps} steps" for c in columns),
            fix="let every site measure the same runs once: bouquet worth measure",
        )
    sites = {}
    for file, column in zip(files, columns, strict=True):
        shown = file.with_suffix(".png")
        picture = base64.b64encode(shown.read_bytes()).decode() if shown.is_file() else ""
        pictures.unpacked(picture)
        sites[column.site] = measured_of(column, picture)
    told = comparison.check(Worth(columns[0].seeds, sites, run.resolve().name, columns[0].steps))
    target = run / comparison.FILE
    comparison.write(target, told)
    for found in worth.verdicts(told):
        print(f"{found.site}  {found.sentence}")
    return target
