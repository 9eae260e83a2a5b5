"""`bouquet hub`: who takes part, and what the run is doing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bouquet import ROOT
from bouquet.cli import common
from bouquet.cli.common import Json, Name, wrong

hub = common.group("Who takes part, and what the run is doing: the hub operator's commands.")


@hub.command()
def invite(
    name: Name,
    hub: Annotated[
        str | None,
        typer.Option(
            "--hub", metavar="HOST:PORT", help="where the site finds the hub; default: HUB_HOST, HUB_PORT in .env"
        ),
    ] = None,
) -> None:
    """The join kit for a new site, .bouquet/kits/NAME.tar.gz; it holds no secret."""
    from bouquet.hub import admission

    admission.invite(name, hub)


@hub.command()
def admit(
    name: Name,
    key: Annotated[Path, typer.Argument(metavar="KEY.pub")],
    images: Annotated[
        int | None, typer.Option(metavar="N", help="weigh this site as N images at most, whatever it reports")
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="SHA256:…", help="what the site read out; any other key is refused")
    ] = None,
) -> None:
    """Let the site with this public key in, after a look at its fingerprint."""
    from bouquet.hub import admission

    admission.admit(name, key, images, fingerprint)


@hub.command()
def revoke(name: Name) -> None:
    """Cut a site off at once, for good: it may come back with a new key alone."""
    from bouquet.hub import admission

    admission.revoke(name)


@hub.command()
def sites(json: Json = False) -> None:
    """Every site: state, last seen, images, GPU, rounds taken part in."""
    from bouquet.hub import admission

    admission.sites(json)


@hub.command()
def status(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="a run's id; default: the newest")] = "",
    follow: Annotated[bool, typer.Option("--follow", help="a line for every change until the run has ended")] = False,
    json: Json = False,
) -> None:
    """The run: round, who has replied, who is missing, until when, the last error of each site. Exit code 3 while it
    works.
    """
    from bouquet.hub import status

    if run and not run.isdecimal():
        raise wrong(f"{run!r} is no run's id")
    raise typer.Exit(status.show(run, follow, json))


@hub.command()
def sign(
    apps: Annotated[list[Path] | None, typer.Argument(metavar="[APP...]", help="checkouts; default: this one")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="where a good signature is, too: APP becomes the newest")
    ] = False,
    key: Annotated[Path, typer.Option(help="the publisher's private key")] = ROOT / "certs" / "publisher.key",
    to: Annotated[Path, typer.Option(help="folder of signatures")] = ROOT / ".bouquet" / "signatures",
) -> None:
    """Sign the app, so that sites which pin this publisher run it, and refuse any other."""
    from bouquet.hub import sign

    sign.sign_and_tell(apps or [ROOT], key, to, again)


@hub.command()
def page(
    port: Annotated[int, typer.Option(help="on this host alone")] = 8445,
    # a container's own, which Compose shows on loopback alone
    host: Annotated[str, typer.Option(hidden=True)] = "127.0.0.1",
) -> None:
    """The hub's page: sites, the run that works, earlier ones; it may only read."""
    from bouquet.hub.live import serve

    serve.serve(host, port)
