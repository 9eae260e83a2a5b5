"""Pictures of an adapter: an adapter and prompts in; one labelled sheet out.

Rows are strengths of the adapter (0 is the base model alone), columns are prompts; picture i of every row starts from
noise seeded by (seed + i). Runs on the GPU where there is one.
Errors: EXPORT-02 to EXPORT-04, EXPORT-08, EXPORT-11, MODEL-01 to -03, MODEL-05, ADAPTER-01, ADAPTER-02.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from app.errors import BouquetError
from bouquet import ROOT, progress

if TYPE_CHECKING:
    from app.config import RunConfig
    from app.families.base import Family

SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDERS = [ROOT / ".bouquet" / "adapters", ROOT / "adapters"]  # of runs, after scripts/demo; after docker compose cp
# in the operator's container
VOLUME = [Path(os.environ["BOUQUET_ADAPTERS"])] if os.environ.get("BOUQUET_ADAPTERS") else []
LATEST = [folder / "latest" for folder in VOLUME + FOLDERS]


@dataclass(frozen=True)
class Which:
    """An adapter: its folder or file, the base model of one that does not name it, and where base models are."""

    named: Path | None
    base: str
    models: Path

    @property
    def place(self) -> Path:
        """The one that was named, else the last run's."""
        return self.named or next((folder for folder in LATEST if folder.exists()), LATEST[0])


def chosen(asked: Sequence[str], config: RunConfig) -> list[str]:
    """The prompts that were asked for, else the run's own. Errors: EXPORT-11."""
    if not (prompts := list(asked or config.prompts)):
        fix = 'say what to draw: --prompt "a photo of a flower"; it may be given again'
        raise BouquetError("EXPORT-11", found="this run has no sample prompts", fix=fix)
    return prompts


def draw(which: Which, prompts: Sequence[str], strengths: Sequence[float], asked: Mapping[str, Any], out: Path) -> None:
    """A sheet with a row for each strength; `asked` is run-config that takes the place of the run's own."""
    from app import bases
    from app.adapter import formats, sample
    from app.config import RunConfig

    file, config = formats.open_file(which.place, which.base, which.models)
    RunConfig.read(asked)  # CONFIG-02 where one is out of range
    config = replace(config, **{key.replace("-", "_"): value for key, value in asked.items()})
    prompts = chosen(prompts, config)
    pipe, rows = sample.dressed(bases.locate(config.base_model, which.models), file), []
    for strength in progress.steps("drawing", strengths):
        unet, text = (sample.scaled(adapter, strength) if strength else None for adapter in file)
        rows.append(sample.render(pipe, unet, prompts, config, text=text))
    names = [named(strength, swept=len(strengths) > 2) for strength in strengths]
    sheet = sample.grid(rows, names, prompts, cell=max(128, min(256, config.resolution)))
    seeds = f"seed {config.seed}" + f" to {config.seed + len(prompts) - 1}" * (len(prompts) > 1)
    drawn = f"drawn    {out}   {len(prompts)} prompts, {', '.join(names)}, {seeds}, on {pipe.device}"
    if str(out) == "-":
        sheet.save(sys.stdout.buffer, format="PNG")
        print(drawn, file=sys.stderr)
        return
    with writing(out, ValueError):  # of a suffix that is no picture's
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    print(drawn)


def named(strength: float, swept: bool) -> str:
    """What a row is called."""
    if not strength:
        return "base"
    return f"{strength:g}" if swept else "adapter" + f" × {strength:g}" * (strength < 1)


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


def merge(which: Which, strength: float, into: Path) -> None:
    """Base model and adapter as one pipeline folder."""
    from app import bases, families
    from app.adapter import formats, sample

    file, config = formats.open_file(which.place, which.base, which.models)
    base = bases.locate(config.base_model, which.models)
    with writing(into):
        formats.merge(base, type(file)(*(sample.scaled(adapter, strength) for adapter in file)), into)
    print(f"merged   {into}   {loading(families.of(base), str(into))}")


def loading(family: Family, place: str) -> str:
    """What a person types to load a pipeline of that family."""
    bare = ", safety_checker=None" * ("safety_checker" in family.absent)
    return f'{family.pipeline}.from_pretrained("{place}"{bare})'
