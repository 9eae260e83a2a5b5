"""`bouquet adapter`: what is done with a run's adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bouquet.cli import common
from bouquet.cli.common import MODELS, Models, wrong

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
Membership = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="a site's membership figures; may be given again, one of each site"),
]
adapter = common.group("What is done with a run's adapter.")


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
    from bouquet.adapter import sample

    if grid and strength != 1.0:
        raise wrong("--grid draws every strength: no --strength")
    lines = common.lines(prompt, prompts)
    which = sample.Which(adapter, base, models)
    if merge:
        sample.merge(which, strength, merge)
    else:
        of_run = {"seed": seed, "sample-steps": steps, "sample-guidance": guidance, "resolution": size}
        asked = {key: value for key, value in of_run.items() if value is not None}
        sample.draw(which, lines, sample.SWEEP if grid else (0.0, strength), asked, out)


@adapter.command()
def parity(adapter: Lora = None, base: Base = "", models: Models = MODELS) -> None:
    """Whether every file of a final folder draws the same picture: PEFT, diffusers, kohya, merged."""
    from bouquet.adapter import publish, sample

    publish.compare(sample.Which(adapter, base, models))


@adapter.command()
def card(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="what the adapter is called on Hugging Face")],
    adapter: Lora = None,
    base: Base = "",
    models: Models = MODELS,
    licence: Licence = None,
    base_id: BaseId = "",
    membership: Membership = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="where the card goes; default: standard output")] = Path(
        "-"
    ),
) -> None:
    """The model card alone: what the adapter is, how to load it, what it was made from; no site's name."""
    from bouquet.adapter import publish, sample

    publish.write_card(
        sample.Which(adapter, base, models), publish.Titled(repo, licence, base_id), out, membership or []
    )


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
    membership: Membership = None,
    without_membership: Annotated[
        bool, typer.Option("--without-membership", help="send it although nobody measured that; the card says so")
    ] = False,
) -> None:
    """To Hugging Face, with its card and pictures, after every file was seen to draw the same and the sites' membership
    figures let it out.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from bouquet.adapter import publish, sample

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError(f"{repo} has no owner: OWNER/NAME")
    except HFValidationError as error:
        raise wrong(str(error)) from None
    which, titled = sample.Which(adapter, base, models), publish.Titled(repo, licence, base_id)
    asked = {"upload": upload, "public": public, "name_sites": name_sites, "without_membership": without_membership}
    publish.publish(which, titled, membership or [], **asked)
