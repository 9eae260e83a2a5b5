"""`bouquet measure` and `bouquet worth`: was it worth it, and is it any good?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bouquet.cli import common
from bouquet.cli.common import Models, Name, Run, wrong

HERE = Path("models")
Columns = Annotated[list[Path], typer.Argument(metavar="COLUMN...", help="the sites' files")]
Photos = Annotated[Path, typer.Option(help="the site's photos")]
Cache = Annotated[Path | None, typer.Option(help="the site's cache")]
measure = common.group("Numbers about pictures, with seeds and counts. Nothing is ever downloaded.")
worth = common.group("Was joining worth it? Measured at every site, collected at the hub.")


@measure.command("pictures")
def measure_pictures(
    run: Run,
    models: Models = HERE,
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to draw; may be given again; default: the run's own prompts")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="pictures a prompt")] = 16,
    judge: Annotated[bool, typer.Option("--judge", help="how often the demo's judge sees what was asked for")] = False,
    photos: Annotated[Path | None, typer.Option(help="KID to the photos of this folder")] = None,
    kid: Annotated[str, typer.Option(help="by the features of inception or judge")] = "inception",
    clip: Annotated[Path | None, typer.Option(help="CLIP score by the model in this folder")] = None,
) -> None:
    """Of the base model and of a run's adapter, from the same seeds: diversity, the judge, KID, CLIP score."""
    from bouquet.adapter import measure

    if kid not in ("inception", "judge"):
        raise wrong(f"--kid is inception or judge, not {kid}")
    asked = measure.Asked(prompt or [], count, judge, photos, kid, clip)
    print(*measure.measure(run, models, asked), sep="\n")


@measure.command("memory")
def measure_memory(
    name: Name,
    run: Run,
    data: Photos,
    models: Models = HERE,
    count: Annotated[int, typer.Option(min=2, help="pictures")] = 16,
    cache: Cache = None,
    out: Annotated[Path | None, typer.Option(help="default: NAME.memory.json")] = None,
) -> None:
    """At a site: does the adapter draw its photos? Only distances are in the file."""
    from bouquet.adapter import measure

    print(*measure.remember(name, run, data, models, count, cache, out), sep="\n")


@measure.command("membership")
def measure_membership(
    name: Name,
    run: Run,
    data: Photos,
    models: Models = HERE,
    count: Annotated[int, typer.Option(min=2, help="photos trained on, and as many held out, at most")] = 1000,
    cache: Cache = None,
    out: Annotated[Path | None, typer.Option(help="default: NAME.membership.json")] = None,
) -> None:
    """At a site: does the adapter tell photos that it was trained on from others? A few numbers are in the file."""
    from bouquet.adapter import measure

    print(*measure.tell(name, run, data, models, count, cache, out), sep="\n")


@measure.command("collect")
def measure_collect(run: Run, columns: Columns) -> None:
    """At the hub: the sites' distances into the run's folder, for the report."""
    from bouquet.adapter import measure

    print(*measure.collect(run, columns), sep="\n")


@worth.command("measure")
def worth_measure(
    name: Name,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs' folders")],
    data: Photos,
    models: Models = HERE,
    cache: Cache = None,
    pool: Annotated[
        list[Path] | None, typer.Option(help="other sites' folders, where they may be had: what pooling would give")
    ] = None,
    alone: Annotated[
        Path | None,
        typer.Option(help="keep here what this site trained alone: an adapter, which other sites may evaluate"),
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option(help="folders that other sites' --alone wrote: their loss on these photos")
    ] = None,
    personal: Annotated[Path | None, typer.Option(help="what bouquet site personal wrote, of these runs")] = None,
    judge: Annotated[int, typer.Option(help="pictures a caption for the demo's judge")] = 0,
    pictures: Annotated[bool, typer.Option("--pictures", help="a sheet of pictures beside the numbers")] = False,
    out: Annotated[Path | None, typer.Option(help="default: NAME.worth.json")] = None,
) -> None:
    """At a site: training alone against the federated adapter, on its own held-out photos; others' too, where asked."""
    from bouquet import worth

    file = out or Path(f"{name}.worth.json")
    shown = file.with_suffix(".png") if pictures else None
    more = worth.More(pool or [], alone, others or [], personal, judge, shown)
    worth.measure_to_file(file, name, data, runs, models, cache, more)
    print(f"worth  {file}")


@worth.command("collect")
def worth_collect(run: Run, columns: Columns) -> None:
    """At the hub: the sites' columns into the run's folder, for the report."""
    from bouquet import worth

    print(f"worth  {worth.collect(run, columns)}")
