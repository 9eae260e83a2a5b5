"""`bouquet site`: a site's operator joins, looks whether the first round will work, and decides on runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.errors import BouquetError
from bouquet.cli import common
from bouquet.cli.common import Json, wrong

CACHE = Path("/cache")
Kit = Annotated[Path, typer.Argument(metavar="[KIT]", help="the unpacked kit's folder; default: this one")]
Cache = Annotated[Path, typer.Argument(metavar="[CACHE]", envvar="BOUQUET_CACHE", show_envvar=False)]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="a run's id")]
site = common.group("At a site: join, see whether the first round will work and what was sent so far.")


@site.command()
def start(kit: Kit = Path()) -> None:
    """Join the hub that the kit is of, with Docker or without: what ./site start does there. Without Docker it lasts
    until the site is stopped.
    """
    common.instead(own(kit), "start")


@site.command()
def stop(kit: Kit = Path()) -> None:
    """Take part no more until the next start; key, settings and cache stay."""
    common.instead(own(kit), "stop")


def own(kit: Path) -> Path:
    """The kit's own program, which knows its settings and how they are to be run. Errors: JOIN-11."""
    if not (file := kit.resolve() / "site").is_file():
        fix = "name the folder that the kit of the hub's operator was unpacked into: bouquet site start KIT"
        raise BouquetError("JOIN-11", found=f"no {file}", fix=fix)
    return file


@site.command()
def check(
    fast: Annotated[bool, typer.Option("--fast", help="no decoding of every photo, no training step")] = False,
    json: Json = False,
    run_config: Annotated[
        str, typer.Option(help='what the hub will run, as in flwr run: "resolution=512 batch-size=8"')
    ] = "",
) -> None:
    """Will this site's first round work? A line a check: pass, warn, fail or skip, and the fix."""
    from bouquet.site import preflight

    raise typer.Exit(preflight.check(fast, json, run_config))


@site.command()
def journal(cache: Cache = CACHE) -> None:
    """What this site did in the runs, round by round, in words."""
    import time

    from app.site import journal

    print("\n".join(journal.told(journal.read(cache), time.time())))


@site.command("privacy")
def site_privacy(
    run_config: Annotated[
        str, typer.Option(help='what the hub will run, as in flwr run: "rounds=8 batch-size=16"')
    ] = "",
) -> None:
    """What this site's photos have given away, and what a planned run would cost them (SITE_PRIVACY)."""
    import os

    from bouquet.site import cost
    from bouquet.site.settings import Settings

    own = Settings.read(os.environ, run_config)
    print("\n".join(cost.told(own.promise, own.config, own.data, own.cache, own.limits, own.models)))


@site.command("personal")
def site_personal(
    run: common.Run,
    data: Annotated[Path, typer.Option(help="the site's photos")],
    name: Annotated[str, typer.Option(help="the site's name")],
    steps: Annotated[int, typer.Option(min=0, max=1_000_000, help="default: a quarter of the run's at one site")] = 0,
    out: Annotated[Path | None, typer.Option(help="default: NAME.personal; the run's name is a folder in it")] = None,
    models: common.Models = Path("models"),
    cache: Annotated[Path | None, typer.Option(help="the site's cache")] = None,
) -> None:
    """Train a run's adapter on, at home: the rate falls to 0 on this site's own photos. It stays here."""
    import tempfile

    from bouquet.adapter import personal

    with tempfile.TemporaryDirectory() as scratch:
        cached = cache or Path(scratch)
        made = personal.train(run, name, data, models, cached, out or Path(f"{name}.personal"), steps)
    print(f"{made.sentence}\npersonal  {made.folder}")


@site.command("runs")
def site_runs(cache: Cache = CACHE) -> None:
    """Runs that wait for this site's consent, in plain words, and what was decided on others."""
    from app.site import consent

    print("\n".join(consent.told(consent.every(cache))))


@site.command()
def approve(run: RunId, cache: Cache = CACHE) -> None:
    """Take part in a run that has asked; a look at it comes first."""
    decide(run, cache, "approved")


@site.command()
def decline(run: RunId, cache: Cache = CACHE) -> None:
    """Take no part in a run that has asked; the hub is told so, and nothing else."""
    decide(run, cache, "declined")


def decide(run: str, cache: Path, state: str) -> None:
    """Ask once more where somebody sits at a terminal; what is decided on is what was shown."""
    from app.site import consent

    if not run.isdecimal():
        raise wrong(f"{run!r} is no run's id")
    what = consent.find(cache, run)
    print("\n".join(consent.words(what)), flush=True)
    if sys.stdin.isatty() and input(f"Is it to be {state}? [y/N] ").strip().lower() not in {"y", "yes"}:
        raise typer.Exit(1)
    print(consent.state_of(consent.decide(cache, what, state)))
