"""`bouquet`: the one command of the hub's operator, of a site's, and of whoever has an adapter. `bouquet --help` says
what there is.

Enters: what a person types. Leaves: an exit code: 0 done, 1 failed, 2 wrong use; `hub status` has 3 for a run that
still works, 141 is an output that nobody reads any more. Every command imports what it needs when it is called: the
hub's answer in half a second.
Errors: those of the commands, with what was found and the fix, on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NoReturn

import typer

from app.errors import BouquetError
from bouquet import ROOT, __version__

WIDE = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
ANY = {"allow_extra_args": True, "ignore_unknown_options": True}
bouquet = typer.Typer(name="bouquet", no_args_is_help=True, pretty_exceptions_enable=False, context_settings=WIDE)
hub, site, adapter, measure, worth, data = (
    typer.Typer(no_args_is_help=True, help=about, context_settings=WIDE)
    for about in (
        "Who takes part, and what the run is doing: the hub operator's commands.",
        "At a site: will the first round work, and what was sent so far.",
        "What is done with a run's adapter.",
        "Numbers about pictures, with seeds and counts. Nothing is ever downloaded.",
        "Was joining worth it? Measured at every site, collected at the hub.",
        "Photos for sites.",
    )
)
for group, name in (
    (hub, "hub"),
    (site, "site"),
    (adapter, "adapter"),
    (measure, "measure"),
    (worth, "worth"),
    (data, "data"),
):
    bouquet.add_typer(group, name=name)

Name = Annotated[str, typer.Argument(metavar="NAME", help="a site's name: a-z, 0-9 and -")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]
Models = Annotated[Path, typer.Option(help="folder of base models", envvar="BOUQUET_MODELS", show_envvar=False)]
Json = Annotated[bool, typer.Option("--json", help="for programs")]
Columns = Annotated[list[Path], typer.Argument(metavar="COLUMN...", help="the sites' files")]
Lora = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="a run's folder, a round's, or a LoRA file; default: the last run's"),
]
Base = Annotated[str, typer.Option("--base", metavar="NAME", help="base model of a LoRA file that does not name it")]
Licence = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Hugging Face's name of the adapter's licence; default: the base model's"),
]
BaseId = Annotated[
    str,
    typer.Option(metavar="OWNER/NAME", help="where Hugging Face has the base model, where Bouquet does not know it"),
]
Cache = Annotated[Path, typer.Argument(metavar="[CACHE]", envvar="BOUQUET_CACHE", show_envvar=False)]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="a run's id")]
MODELS, CACHE = ROOT / "models", Path("/cache")


def given(words: dict[str, Any]) -> SimpleNamespace:
    """What was typed, by name: a command's own locals()."""
    return SimpleNamespace(**words)


def outside(script: str, *arguments: str) -> NoReturn:
    """One of the programs that work before Python is there, in this process's place."""
    import os

    if not (file := ROOT / "scripts" / script).is_file():
        raise BouquetError("HOST-18", found=f"no {file}", fix=f"in a clone: scripts/{script}")
    sys.stdout.flush()
    os.execv(file, [str(file), *arguments])


def wrong(what: str) -> typer.BadParameter:
    return typer.BadParameter(what)


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
    outside("doctor", *context.args)


@bouquet.command(context_settings=ANY)
def demo(context: typer.Context) -> None:
    """From a clone to a federated adapter and its pictures. Options: scripts/demo --help."""
    outside("demo", *context.args)


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


# --- hub --------------------------------------------------------------------------------------------------------------


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


# --- a site -----------------------------------------------------------------------------------------------------------


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


# --- a run ------------------------------------------------------------------------------------------------------------


@bouquet.command()
def run(
    run_config: Annotated[str, typer.Option(help="as for flwr run: 'rounds=2 local-steps=5', or a .toml file")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="start it, and do not wait for its end")] = False,
) -> None:
    """Start a run and follow it to its real end: exit code 0 when it ended well, where `flwr run --stream` has 0 in any
    case.
    """
    from bouquet.hub import runs

    number = runs.start_run(run_config)
    print(f"run {number} has started; bouquet hub status {number}", flush=True)
    if not detach:
        state, details = runs.follow(number, lambda line: print(line, flush=True), timeout=float("inf"))
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


# --- its adapter ------------------------------------------------------------------------------------------------------


@adapter.command()
def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to draw; may be given again; default: the run's own prompts")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="a text file, a prompt a line")] = None,
    adapter: Lora = None,
    base: Base = "",
    models: Models = MODELS,
    strength: Annotated[float, typer.Option(min=0, max=1, help="how much of the adapter")] = 1.0,
    grid: Annotated[bool, typer.Option("--grid", help="a row each for strength 0, 0.25, 0.5, 0.75 and 1")] = False,
    seed: Annotated[
        int | None, typer.Option(help="of the first picture's noise; the next prompt's is one more; default: the run's")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default: the run's")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance; default: the run's")] = None,
    size: Annotated[
        int | None, typer.Option(help="side of the pictures in pixels, a multiple of 8; default: the run's")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the sheet goes; - is standard output")] = Path(
        "sample.png"
    ),
    merge: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="write base model and adapter as one pipeline folder, and draw nothing"),
    ] = None,
) -> None:
    """Before/after pictures: the same prompts and seeds without the adapter and with it."""
    asked = given(locals())
    from bouquet.adapter import sample

    if grid and strength != 1.0:
        raise wrong("--grid draws every strength: no --strength")
    lines = list(prompt or [])
    if prompts:
        try:
            lines += [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise wrong(f"--prompts {prompts}: {error}") from None
    asked.prompt = lines
    sample.merge(asked) if merge else sample.draw(asked)


@adapter.command()
def parity(adapter: Lora = None, base: Base = "", models: Models = MODELS) -> None:
    """Whether every file of a final folder draws the same picture: PEFT, diffusers, kohya, merged."""
    asked = given(locals())
    from bouquet.adapter import publish

    publish.compare(asked)


@adapter.command()
def card(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="what the adapter is called on Hugging Face")],
    adapter: Lora = None,
    base: Base = "",
    models: Models = MODELS,
    licence: Licence = None,
    base_id: BaseId = "",
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the card goes; default: standard output")] = Path(
        "-"
    ),
) -> None:
    """The model card alone: what the adapter is, how to load it, what it was made from; no site's name."""
    asked = given(locals())
    from bouquet.adapter import publish

    publish.write_card(asked)


@adapter.command()
def publish(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    adapter: Lora = None,
    base: Base = "",
    models: Models = MODELS,
    upload: Annotated[bool, typer.Option("--upload", help="send it; without this, everything but that")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="a new repository is for everybody; default: private")
    ] = False,
    licence: Licence = None,
    base_id: BaseId = "",
    name_sites: Annotated[bool, typer.Option("--name-sites", help="leave the sites' names in provenance.json")] = False,
) -> None:
    """To Hugging Face, with its card and pictures, after every file was seen to draw the same."""
    asked = given(locals())
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from bouquet.adapter import publish

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError(f"{repo} has no owner: OWNER/NAME")
    except HFValidationError as error:
        raise wrong(str(error)) from None
    publish.publish(asked)


# --- was it worth it, and is it any good ------------------------------------------------------------------------------


@measure.command("pictures")
def measure_pictures(
    run: Run,
    models: Models = Path("models"),
    count: Annotated[int, typer.Option(min=2, help="pictures a prompt")] = 16,
    judge: Annotated[bool, typer.Option("--judge", help="how often the demo's judge sees what was asked for")] = False,
    photos: Annotated[Path | None, typer.Option(help="KID to the photos of this folder")] = None,
    kid: Annotated[str, typer.Option(help="by the features of inception or judge")] = "inception",
    clip: Annotated[Path | None, typer.Option(help="CLIP score by the model in this folder")] = None,
) -> None:
    """Of the base model and of a run's adapter, from the same seeds: diversity, the judge, KID, CLIP score."""
    asked = given(locals())
    from bouquet.adapter import measure

    if kid not in ("inception", "judge"):
        raise wrong(f"--kid is inception or judge, not {kid}")
    print(*measure.measure(asked), sep="\n")


@measure.command("memory")
def measure_memory(
    name: Name,
    run: Run,
    data: Annotated[Path, typer.Option(help="the site's photos")],
    models: Models = Path("models"),
    count: Annotated[int, typer.Option(min=2, help="pictures")] = 16,
    cache: Annotated[Path | None, typer.Option(help="the site's cache")] = None,
    out: Annotated[Path | None, typer.Option(help="default: NAME.memory.json")] = None,
) -> None:
    """At a site: does the adapter draw its photos? Only distances are in the file."""
    asked = given(locals())
    from bouquet.adapter import measure

    print(*measure.remember(asked), sep="\n")


@measure.command("collect")
def measure_collect(run: Run, columns: Columns) -> None:
    """At the hub: the sites' distances into the run's folder, for the report."""
    from bouquet.adapter import measure

    print(*measure.collect(run, columns), sep="\n")


@worth.command("measure")
def worth_measure(
    name: Name,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs' folders")],
    data: Annotated[Path, typer.Option(help="the site's photos")],
    models: Models = Path("models"),
    cache: Annotated[Path | None, typer.Option(help="the site's cache")] = None,
    pool: Annotated[
        list[Path] | None, typer.Option(help="other sites' folders, where they may be had: what pooling would give")
    ] = None,
    judge: Annotated[int, typer.Option(help="pictures a caption for the demo's judge")] = 0,
    pictures: Annotated[bool, typer.Option("--pictures", help="a sheet of pictures beside the numbers")] = False,
    out: Annotated[Path | None, typer.Option(help="default: NAME.worth.json")] = None,
) -> None:
    """At a site: training alone against the federated adapter, on its own held-out photos."""
    asked = given(locals())
    from bouquet import worth

    asked.pool = pool or []
    print(f"worth  {worth.measure_to_file(asked)}")


@worth.command("collect")
def worth_collect(run: Run, columns: Columns) -> None:
    """At the hub: the sites' columns into the run's folder, for the report."""
    from bouquet import worth

    print(f"worth  {worth.collect(run, columns)}")


@data.command()
def partition(
    dataset: Annotated[
        str, typer.Option(help="mini (drawn here), a folder, or a data set's name at Hugging Face")
    ] = "mini",
    sites: Annotated[int, typer.Option(help="how many")] = 2,
    out: Annotated[Path, typer.Option(help="folder for site-1 ...")] = ROOT / ".bouquet" / "data",
    images_per_site: Annotated[
        int | None, typer.Option(help="at most this many; default: 200 of mini, else all there are")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the drawing, or of shuffling and dividing")] = 0,
    caption_template: Annotated[
        str | None, typer.Option(help="made from the class name; default: the text column")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="iid (sites alike), dirichlet (classes skewed) or label (classes apart)")
    ] = None,
    alpha: Annotated[float, typer.Option(help="of dirichlet: smaller is more skewed")] = 0.5,
    public: Annotated[
        bool, typer.Option("--public", help="everybody has these photos: no secret, no floors (mini: always)")
    ] = False,
    split: Annotated[str, typer.Option(help="which split of the data set")] = "train",
) -> None:
    """Divide a data set among sites: site-1 ... site-N, each a folder of images with metadata.jsonl."""
    asked = given(locals())
    from bouquet.data import partition

    if by not in (None, "iid", "dirichlet", "label"):
        raise wrong(f"--by is iid, dirichlet or label, not {by}")
    if dataset == "mini" and (by or caption_template):
        raise wrong("mini has its own captions, and its sites hold different species: no --by, no --caption-template")
    if sites < 1 or alpha <= 0 or (images_per_site is not None and images_per_site < 2):
        raise wrong("--sites starts at 1, --images-per-site at 2, --alpha above 0")
    partition.divide(asked)


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
