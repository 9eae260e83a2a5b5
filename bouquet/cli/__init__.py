"""`bouquet`: the one command of the hub's operator, of a site's, and of whoever has an adapter. `bouquet --help` says
what there is. A module here is a group of commands: what a person types, and what of it is wrong use.

Enters: what a person types. Leaves: an exit code: 0 done, 1 failed, 2 wrong use; `hub status` has 3 for a run that
still works, 141 is an output that nobody reads any more. Every command imports what it needs when it is called: the
hub's answer in half a second.
Errors: those of the commands, with what was found and the fix, on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from app.errors import BouquetError
from bouquet import __version__
from bouquet.cli import adapter, data, hub, measure, site
from bouquet.cli.common import ANY, WIDE, Json, instead, scripts, wrong

bouquet = typer.Typer(name="bouquet", no_args_is_help=True, pretty_exceptions_enable=False, context_settings=WIDE)
for group, name in (
    (hub.hub, "hub"),
    (site.site, "site"),
    (adapter.adapter, "adapter"),
    (measure.measure, "measure"),
    (measure.worth, "worth"),
    (data.data, "data"),
):
    bouquet.add_typer(group, name=name)


@bouquet.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="the version of this program and of the app that it signs")
    ] = False,
) -> None:
    """Institutions fine-tune one image model together, and no image moves."""
    if version:
        print(f"bouquet {__version__}")
        raise typer.Exit


@bouquet.command(context_settings=ANY)
def doctor(context: typer.Context) -> None:
    """What is wrong with this host: Python, Docker, ports, disk, certificates, settings, each with its fix."""
    instead(scripts("doctor"), *context.args)


@bouquet.command(context_settings=ANY)
def demo(context: typer.Context) -> None:
    """From a clone to a federated adapter and its pictures. Options: scripts/demo --help."""
    instead(scripts("demo"), *context.args)


@bouquet.command()
def audit(
    logs: Annotated[
        list[Path] | None, typer.Argument(metavar="[LOG...]", help="default: those of this machine")
    ] = None,
    head: Annotated[str, typer.Option(metavar="HASH", help="a head that was kept: is its line still there?")] = "",
    json: Json = False,
) -> None:
    """Who did what, at the hub or at a site, and whether the log is as it was written."""
    from bouquet import audit

    audit.show(logs or [], head, json)


@bouquet.command()
def run(
    run_config: Annotated[str, typer.Option(help="as for flwr run: 'rounds=2 local-steps=5', or a .toml file")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="start it, and do not wait for its end")] = False,
) -> None:
    """Start a run and follow it to its real end: exit code 0 when it ended well, where `flwr run --stream` has 0 in any
    case.
    """
    from bouquet.hub import following, runs

    number = runs.start_run(run_config)
    print(f"run {number} has started; bouquet hub status {number}", flush=True)
    if not detach:
        state, details = following.watch(number)
        print(f"run {number}  {state}  {details}".rstrip())
        raise typer.Exit(int(state != "finished:completed"))


@bouquet.command()
def report(
    run: Annotated[
        str, typer.Argument(metavar="[RUN]", help="a run's folder or its id; default: the last run that ended well")
    ] = "latest",
    out: Annotated[
        str, typer.Option(help="where the page goes; default: report.html in the run's folder; - is standard output")
    ] = "",
    follow: Annotated[
        bool, typer.Option("--follow", help="while the run works: its progress, and a new page after every round")
    ] = False,
) -> None:
    """One HTML file about a run: did it work, what to look at, pictures, sites, time, GPU, files and hashes."""
    from bouquet.report import command

    if follow and out == "-":
        raise wrong("--follow writes a file again and again; give --out a file")
    raise typer.Exit(command.report(run, out, follow))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command."""
    import click

    try:
        return (
            bouquet(list(sys.argv[1:] if arguments is None else arguments), prog_name="bouquet", standalone_mode=False)
            or 0
        )
    except BouquetError as error:
        print(error.report(), file=sys.stderr)
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
