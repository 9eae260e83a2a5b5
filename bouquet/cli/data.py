"""`bouquet data`: photos for sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bouquet import ROOT
from bouquet.cli import common
from bouquet.cli.common import MODELS, Models, wrong

data = common.group("Photos for sites.")


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
    from bouquet.data import partition
    from bouquet.data.sources import Division

    if by not in (None, "iid", "dirichlet", "label"):
        raise wrong(f"--by is iid, dirichlet or label, not {by}")
    if dataset == "mini" and (by or caption_template):
        raise wrong("mini has its own captions, and its sites hold different species: no --by, no --caption-template")
    if sites < 1 or alpha <= 0 or (images_per_site is not None and images_per_site < 2):
        raise wrong("--sites starts at 1, --images-per-site at 2, --alpha above 0")
    partition.divide(
        Division(dataset, sites, out, images_per_site, seed, caption_template, by or "iid", alpha, public, split)
    )


@data.command("class-images")
def class_images(
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder that is made: class-images in a site's data folder")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to draw, and each picture's caption; may be given again")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="a text file, a prompt a line")] = None,
    count: Annotated[int, typer.Option(min=1, help="pictures, of one prompt after another")] = 200,
    base: Annotated[
        str | None, typer.Option(metavar="NAME", help="base model; default: a run's, as of all below")
    ] = None,
    models: Models = MODELS,
    size: Annotated[int | None, typer.Option(help="side in pixels: the run's resolution")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance")] = None,
    seed: Annotated[int, typer.Option(help="of the first picture's noise; the next one's is one more")] = 0,
) -> None:
    """Pictures that the base model draws itself, for a run that is to keep what it knows (prior-loss-weight)."""
    from app.config import RunConfig
    from bouquet.data import classes

    asked = common.lines(prompt, prompts)
    if not asked:
        raise wrong("nothing to draw: --prompt or --prompts")
    drawn = {"base-model": base, "resolution": size, "sample-steps": steps, "sample-guidance": guidance, "seed": seed}
    given = {key: value for key, value in drawn.items() if value is not None}  # the rest as in a run
    classes.draw(RunConfig.read(given), models, asked, count, out)
