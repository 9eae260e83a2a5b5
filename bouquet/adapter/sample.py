"""Pictures of an adapter: an adapter and prompts in; one labelled sheet out.

Rows are strengths of the adapter (0 is the base model alone), columns are prompts; picture i of every row starts from
noise seeded by (seed + i). Runs on the GPU where there is one.
Errors: EXPORT-02 to EXPORT-04, MODEL-01 to -03, MODEL-05, ADAPTER-01, ADAPTER-02.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from app.errors import BouquetError
from bouquet import ROOT

if TYPE_CHECKING:
    from app.adapter.lora_files import LoraFile
    from app.config import RunConfig
    from app.families.base import Family

SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDERS = [ROOT / ".bouquet" / "adapters", ROOT / "adapters"]  # of runs, after scripts/demo; after docker compose cp
# in the operator's container
VOLUME = [Path(os.environ["BOUQUET_ADAPTERS"])] if os.environ.get("BOUQUET_ADAPTERS") else []
LATEST = [folder / "latest" for folder in VOLUME + FOLDERS]


def chosen(args: SimpleNamespace) -> Path:
    """The adapter that was named, else the last run's."""
    return args.adapter or next((folder for folder in LATEST if folder.exists()), LATEST[0])


def opened(args: SimpleNamespace) -> tuple[LoraFile, RunConfig, Path]:
    """(what the LoRA file holds, the configuration of its run, its base model's folder)."""
    from app import model
    from app.adapter import formats

    file, config = formats.open_file(chosen(args), args.base, args.models)
    return file, config, model.locate(config.base_model, args.models)


def draw(args: SimpleNamespace) -> None:
    from app.adapter import sample
    from app.config import RunConfig

    file, config, base = opened(args)
    asked = {"sample-steps": args.steps, "sample-guidance": args.guidance, "resolution": args.size, "seed": args.seed}
    given = {key: value for key, value in asked.items() if value is not None}
    RunConfig.read(given)  # CONFIG-02 where one is out of range
    config = replace(config, **{key.replace("-", "_"): value for key, value in given.items()})
    prompts, strengths = args.prompt or list(config.prompts), SWEEP if args.grid else (0.0, args.strength)
    pipe, rows = sample.dressed(base, file), []
    for strength in strengths:
        unet, text = (sample.scaled(adapter, strength) if strength else None for adapter in file)
        rows.append(sample.render(pipe, unet, prompts, config, text=text))
    names = [
        "base" if not strength else f"{strength:g}" if args.grid else "adapter" + f" × {strength:g}" * (strength < 1)
        for strength in strengths
    ]
    sheet = sample.grid(rows, names, prompts, cell=max(128, min(256, config.resolution)))
    seeds = f"seed {config.seed}" + f" to {config.seed + len(prompts) - 1}" * (len(prompts) > 1)
    drawn = f"drawn    {args.out}   {len(prompts)} prompts, {', '.join(names)}, {seeds}, on {pipe.device}"
    if str(args.out) == "-":
        sheet.save(sys.stdout.buffer, format="PNG")
        print(drawn, file=sys.stderr)
        return
    with writing(args.out, ValueError):  # of a suffix that is no picture's
        args.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.out)
    print(drawn)


@contextmanager
def writing(place: Path, *also: type[Exception]) -> Iterator[None]:
    """Errors: EXPORT-08."""
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except kinds as error:
        fix = "name another place: --out FILE.png, --merge DIR; in the operator's container: --out - >FILE.png"
        raise BouquetError(
            "EXPORT-08",
            found=f"{place}: {getattr(error, 'strerror', '') or error}",
            fix=fix,
        ) from None


def merge(args: SimpleNamespace) -> None:
    from app import families
    from app.adapter import formats, sample

    file, _, base = opened(args)
    with writing(args.merge):
        formats.merge(base, type(file)(*(sample.scaled(adapter, args.strength) for adapter in file)), args.merge)
    print(f"merged   {args.merge}   {loading(families.of(base), str(args.merge))}")


def loading(family: Family, place: str) -> str:
    """What a person types to load a pipeline of that family."""
    bare = ", safety_checker=None" * ("safety_checker" in family.absent)
    return f'{family.pipeline}.from_pretrained("{place}"{bare})'
