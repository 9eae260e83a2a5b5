"""Was joining worth it? Each site measures its own column, at the site; the hub puts the columns together.

  bouquet worth measure NAME --data DIR RUN... [--alone DIR] [--others DIR...] [--personal DIR] [--models DIR]
  [--cache DIR] [--pool DIR...] [--judge COUNT] [--pictures] [--out FILE]
  bouquet worth collect RUN COLUMN...

measure   at the site NAME: trains alone on its photos, with the steps and seeds of the RUNs, which are alike but for
          their seed, and compares the base, its own and each run's adapter on its held-out photos. Only numbers are in
          FILE (default: NAME.worth.json). --alone keeps what it trained alone in DIR, and takes it from there the next
          time: an adapter, which the site may hand to the other sites (alone.py). --others evaluates theirs on this
          site's photos, for the other half of their answer: what joining brought them on photos that they do not have.
          --personal is what bouquet site personal wrote. --pool, where photos may be pooled, adds a training on all of
          them with all sites' steps. --judge, for the demo's base model, adds the share of COUNT pictures a species in
          which the judge sees what was asked for. Photos that are private need the site's own cache folder, where its
          secret is, and its SITE_LIMITS. --pictures draws the first RUN's prompts under each contender, from the same
          seeds, into FILE's .png: look at it, and send it along if you agree to it being shown.
collect   at the hub: worth.json in RUN's folder, for bouquet report; a picture that lies beside a COLUMN comes along.

Errors: WORTH-01 (runs that cannot be compared), WORTH-02 (columns that do not fit each other), WORTH-03 and -04
(alone.py, personal.py).
"""

from __future__ import annotations

import base64
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.config import RunConfig
from app.errors import BouquetError, ConfigError
from app.hub import history
from app.hub.history import History
from app.site import budget
from app.site.limits import Limits
from bouquet import progress
from bouquet.data import listing
from bouquet.report import comparison, pictures, worth
from bouquet.report.comparison import Column, Measured, Worth

if TYPE_CHECKING:
    from app.model import Adapter
    from app.site.train import Site


FORMER = {"learning_rate_schedule": "constant"}  # what runs did before they could say it
# what may differ between runs that are alike: it leaves the adapter as it is
APART = (
    "seed",
    "resume",
    "keep_rounds",
    "wait_for_sites",
    "round_timeout",
    "round_patience",
    "round_retries",
    "tracker",
)


@dataclass(frozen=True)
class More:
    """What a site compares beside the base, itself alone and the federated adapter."""

    pool: Sequence[Path] = ()  # the other sites' photos, where they may be had
    alone: Path | None = None  # where this site's own adapters are kept, and taken from
    others: Sequence[Path] = ()  # those of other sites
    personal: Path | None = None  # the runs' adapters, trained on at home
    judge: int = 0
    shown: Path | None = None  # the file for a sheet of pictures


def measure_to_file(
    out: Path, name: str, data: Path, runs: list[Path], models: Path, cache: Path | None, more: More
) -> None:
    """A site's column in its file; a sentence about it on standard output."""
    with tempfile.TemporaryDirectory() as scratch:
        column = measure(name, data, runs, models, cache or Path(scratch) / "cache", more)
    comparison.write(out, column)
    if more.shown:
        print(f"picture  {more.shown}   look at it; it goes to the hub only if you send it along")
    if more.alone:
        print(f"alone    {more.alone}   an adapter of these photos: yours to hand to the other sites, or to keep")
    print(worth.verdict(column.site, {column.site: measured_of(column)}).sentence)


def alike(runs: list[Path]) -> list[RunConfig]:
    """Each run's configuration, in the order of the runs. Errors: WORTH-01 unless they differ in their seed, and beside
    that in nothing that makes another adapter; and where they began with a LoRA file, as nobody who trains alone does.
    """
    histories = [history.read(run / history.FILE) for run in runs]
    configs = [config_of(told, run) for told, run in zip(histories, runs, strict=True)]
    tables = [asdict(config) for config in configs]
    other = [key for key in tables[0] if key not in APART and len({table[key] for table in tables}) > 1]
    if len({told.base and told.base.fingerprint for told in histories}) > 1:
        other.append("base model's fingerprint")
    found, fix = "", "give finished runs that are alike but for their seed: --run-config 'seed=43'"
    if other:
        found = f"; they have another {', '.join(name.replace('_', '-') for name in other)}"
    elif begun := [run.name for run, told in zip(runs, histories, strict=True) if told.started_from]:
        found = f"; {begun[0]} began with a LoRA file, from which nobody trains alone here"
        fix = "compare runs without start-from"
    if (
        found
        or len({config.seed for config in configs}) < len(configs)
        or any(h.state != "finished" for h in histories)
    ):
        named = (f"{run.name}: {h.state}, seed {c.seed}" for run, h, c in zip(runs, histories, configs, strict=True))
        raise BouquetError("WORTH-01", found=", ".join(named) + found, fix=fix)
    return configs


def config_of(told: History, run: Path) -> RunConfig:
    """A run's configuration, as this version knows it. Errors: WORTH-01."""
    try:
        return RunConfig.read({key.replace("_", "-"): v for key, v in (FORMER | told.config).items()}, ended=True)
    except ConfigError as error:
        fix = "compare runs of this version"
        raise BouquetError("WORTH-01", found=f"{run.name}: {error}", fix=fix) from None


def measure(name: str, data: Path, runs: list[Path], models: Path, cached: Path, more: More) -> Column:
    """One site's column of worth.json; in `more.alone` its own adapters, where that is asked for, and in the file
    `more.shown` what each contender of the first run draws.
    """
    from app import bases, families, model
    from app.adapter import sample, store
    from app.site import privacy, train
    from bouquet.adapter import alone as kept
    from bouquet.adapter import personal
    from bouquet.adapter import sample as drawing

    configs, limits = alike(runs), Limits.read(os.environ.get("SITE_LIMITS", ""))
    promise = budget.of(os.environ, cached)
    if more.shown:
        drawing.chosen((), configs[0])
    if more.alone:
        kept.check_leaves(limits, promise)
    base = bases.locate(configs[0].base_model, models)
    seeds = tuple(config.seed for config in configs)
    finals = {seed: store.read_adapter(run / "final") for seed, run in zip(seeds, runs, strict=True)}
    told = {seed: model.adapter_hash(adapter) for seed, adapter in finals.items()}
    shape = model.new_adapter(base, configs[0])
    own = (kept.read_own(more.alone, name, told, shape) if more.alone else None) or {}
    others = kept.read_others(more.others, name, told, shape)
    loss: dict[str, list[float]] = defaultdict(list)
    judged: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    held_out = []
    for run, config in zip(runs, map(kept.by_itself, configs), strict=True):
        # of whom nothing is sent here; who is held out is as in the run
        site = train.Site(config, models, data, cached, "", limits=limits, promise=promise)
        held_out.append(len(site.held_out.keys))
        check_told(site, limits)
        fresh = model.new_adapter(base, config)
        if config.seed not in own:
            own[config.seed] = alone(site, fresh, name)
        adapters = {"base": fresh, "alone": own[config.seed], "federated": finals[config.seed]}
        if more.personal:
            adapters["personal"] = personal.read(more.personal, run, finals[config.seed])
        if more.pool:
            adapters["pooled"] = pooled(site, fresh, [data, *more.pool], models)
        for contender, adapter in adapters.items():
            loss[contender].append(loss_of(site, adapter))
            if more.judge:
                judged[contender].append(right(base, None if contender == "base" else adapter, config, more.judge))
        for other, by_seed in others.items():
            theirs[other].append(loss_of(site, by_seed[config.seed]))
        if more.shown and run == runs[0]:
            sample.sheet(
                base, {who: None if who == "base" else adapter for who, adapter in adapters.items()}, config
            ).save(more.shown)
        print(
            f"seed {config.seed}  " + "  ".join(f"{who} {values[-1]:.4f}" for who, values in loss.items()), flush=True
        )
    if more.alone:
        kept.write(more.alone, name, told, own, configs[0], families.of(base))
    numbers = [{who: tuple(values) for who, values in kind.items()} or None for kind in (loss, judged, theirs)]
    steps = configs[0].rounds * configs[0].local_steps
    return Column(
        name, seeds, min(held_out), numbers[0] or {}, numbers[1], steps, numbers[2],
        digits=privacy.DIGITS if site.privacy.private else None, runs={str(seed): sha for seed, sha in told.items()},
    )  # fmt: skip


def check_told(site: Site, limits: Limits) -> None:
    """Errors: WORTH-04 where the loss is one of fewer private photos than may be told. A run with a promise of privacy
    holds out fewer, as it tells no loss.
    """
    held_out, least = len(site.held_out.keys), limits.private().floor("min-held-out")
    if site.privacy.private and held_out < least:
        raise BouquetError(
            "WORTH-04",
            found=f"this site held out {held_out} private photos in these runs, and a loss of fewer than {least} stays",
            fix="compare at sites with more photos, or runs with a larger validation-fraction",
        )


def loss_of(site: Site, adapter: Adapter) -> float:
    """On the photos that the site holds out, as it may leave."""
    from app import model

    model.apply_adapter(site.net, adapter)
    return site.privacy.number(site.evaluate())


def pooled(site: Site, start: Adapter, folders: list[Path], models: Path) -> Adapter:
    """What one training on all sites' photos makes, with all their steps; without those that this site held out."""
    from app.site import train

    with tempfile.TemporaryDirectory() as scratch:
        photos = together(folders, Path(scratch) / "photos", site.held_out.keys)
        if site.config.prior_loss_weight:
            with_classes(folders, photos)
        longer = replace(site.config, rounds=site.config.rounds * len(folders))
        return alone(train.Site(longer, models, photos, Path(scratch) / "cache", ""), start, "pooled")


def measured_of(column: Column, picture: str = "") -> Measured:
    """A site's column as worth.json has it."""
    return Measured(column.held_out, column.loss, column.judge, picture, column.others, column.digits)


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
    """All photos and captions in one folder, but for those set aside by their keys. Where photos are public one is held
    out by its bytes, so that what another site holds out is held out here. Whoever may read this folder has all of it:
    no hub asks about it.
    """
    from app.site import privacy
    from app.site.photos import data

    target.mkdir()
    captions = []
    for number, folder in enumerate(folders):
        for photo in data.scan(folder).photos:
            if photo.key in aside:
                continue
            file = f"{number}-{photo.key}{Path(photo.name).suffix or '.png'}"
            (target / file).write_bytes(photo.load())
            captions.append((file, photo.captions))
    listing.write(target, captions)
    privacy.declare_public(target, data.scan(target).photos)
    return target


def with_classes(folders: list[Path], photos: Path) -> None:
    """The class images of all that have some, in the folder of the pooled photos."""
    from app.site import privacy
    from app.site.photos import data
    from app.site.photos.folders import CLASS

    together([folder / CLASS for folder in folders if (folder / CLASS).is_dir()], photos / CLASS)
    privacy.declare_public(photos, (*data.scan(photos).photos, *data.look(photos / CLASS).photos))


def right(base: Path, adapter: Adapter | None, config: RunConfig, count: int) -> float:
    """The mean share, over all species, of pictures in which the demo's judge sees what was asked for."""
    from app.adapter import sample
    from models.mini import draw, learned

    found = learned.right(sample.pipeline(base, config), adapter, config, count, draw.SPECIES)
    return statistics.fmean(n / count for n in found.values())


def collect(run: Path, files: list[Path]) -> Path:
    """worth.json in the run's folder. Errors: WORTH-02 unless the columns have the same seeds, steps and runs, of which
    RUN is one; REPORT-04.
    """
    columns = [comparison.read_column(file) for file in files]
    alike = {(column.seeds, column.steps) for column in columns}
    if len(alike) > 1 or len({column.site for column in columns}) < len(columns):
        raise unfit(", ".join(f"{c.site}: seeds {list(c.seeds)}, {c.steps} steps" for c in columns))
    measured = [column for column in columns if column.runs]
    final = history.read_provenance(run / "final" / history.PROVENANCE).adapter_sha256 if measured else ""
    for column in measured:
        if column.runs != measured[0].runs:
            raise unfit(f"{column.site} has measured other runs than {measured[0].site}, of the same seeds")
        if final and final not in (column.runs or {}).values():
            raise unfit(f"{column.site} has measured runs of which {run.name} is none")
    sites = {}
    for file, column in zip(files, columns, strict=True):
        shown = file.with_suffix(".png")
        picture = base64.b64encode(shown.read_bytes()).decode() if shown.is_file() else ""
        pictures.unpacked(picture)
        sites[column.site] = measured_of(column, picture)
    told = comparison.check(Worth(columns[0].seeds, sites, run.resolve().name, columns[0].steps))
    sentences = [f"{found.site}  {found.sentence}" for found in worth.verdicts(told)]
    comparison.write(target := run / comparison.FILE, told)
    print(*sentences, sep="\n")
    return target


def unfit(found: str) -> BouquetError:
    return BouquetError("WORTH-02", found=found, fix="let every site measure the same runs once: bouquet worth measure")
