"""Numbers about pictures, with seeds and counts. Nothing is ever downloaded.

  bouquet measure pictures RUN [--prompt TEXT]... [--count N] [--judge] [--photos DIR [--kid inception|judge]]
                               [--clip DIR] [--models DIR]
  bouquet measure memory NAME --data DIR RUN [--count N] [--models DIR] [--cache DIR] [--out FILE]
  bouquet measure membership NAME --data DIR RUN [--count N] [--models DIR] [--cache DIR] [--out FILE]
  bouquet measure collect RUN COLUMN...

pictures  of the base model and of RUN's adapter, N for each --prompt, else for each of the run's own, from the same
          seeds: how unlike the pictures of one prompt are (diversity); --judge, for the demo's base model: how often
          the judge sees what was asked for; --photos: their kernel distance (KID) to the photos in DIR, which need no
          captions; --clip: CLIP score by the model in DIR. KID and CLIP score are torchmetrics', and need it and their
          weights on this machine. Goes into RUN/measures.json.
memory    at the site NAME: draws N pictures from its training captions and measures how near each is to one training
          photo. Only distances are in FILE (default: NAME.memory.json).
membership  at the site NAME: how well photos that the run trained on are told from held-out ones (membership.py), into
          FILE (default: NAME.membership.json), which bouquet adapter publish asks for.
collect   at the hub: memory.json in RUN's folder, for bouquet report.

Errors: MEASURE-01 (a package, weights or photos are not here), MEASURE-02 (columns that cannot be read or do not fit),
EXPORT-11 (no prompts).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from app import files
from app.errors import BouquetError
from bouquet import progress
from bouquet.adapter.sample import chosen

if TYPE_CHECKING:
    from PIL import Image

    from app.adapter.sample import Pipeline
    from app.config import RunConfig
    from app.model import Adapter


@dataclass(frozen=True)
class Asked:
    """What is measured of a run: `count` pictures of each prompt, of the run's own where none is given; what beside
    their diversity.
    """

    prompts: Sequence[str] = ()
    count: int = 16
    judge: bool = False
    photos: Path | None = None
    kid: str = "inception"
    clip: Path | None = None


def measure(run: Path, models: Path, asked: Asked) -> list[str]:
    """measures.json of a run. Errors: EXPORT-11 or MEASURE-01 before anything is drawn."""
    from app import bases, model
    from app.adapter import formats, sample
    from bouquet.adapter import pictures

    need(asked)
    adapter, config = formats.open_adapter(run, models=models)
    prompts, count = chosen(asked.prompts, config), asked.count
    if asked.judge:
        pictures.species(prompts)
    real, skipped = pictures.photos(asked.photos, config.resolution) if asked.photos else ([], 0)
    pipe = sample.pipeline(bases.locate(config.base_model, models), config)
    drawn = pairs(pipe, adapter, config, prompts, count)
    told: dict[str, Any] = {
        "run": run.resolve().name,
        "adapter": model.adapter_hash(adapter),
        "prompts": prompts,
        "count": count,
        "seeds": [config.seed, config.seed + count - 1],
        "diversity": {name: pictures.diversity(pipe, rows) for name, rows in drawn.items()},
    }
    if asked.judge:
        told["judge"] = {name: pictures.judged(prompts, rows) for name, rows in drawn.items()}
    if real:
        told["kid"] = {name: pictures.kid(sum(rows, []), real, asked.kid, config.seed) for name, rows in drawn.items()}
        told["kid"] |= {"features": asked.kid, "photos": len(real), "skipped": skipped}
    if asked.clip:
        told["clip"] = {name: pictures.clip(prompts, rows, asked.clip) for name, rows in drawn.items()}
        told["clip"] |= {"model": asked.clip.name}
    folder = run if run.is_dir() else run.parent
    target = (folder.parent if folder.name == "final" else folder) / "measures.json"
    files.write_json(target, told)
    kinds = [kind for kind in ("diversity", "judge", "kid", "clip") if kind in told]
    lines = [f"{kind:<10} base {shown(told[kind]['base'])}  adapter {shown(told[kind]['adapter'])}" for kind in kinds]
    if skipped:
        lines.append(f"skipped    {skipped} photos of {asked.photos} that cannot be read")
    return [
        *lines,
        (
            f"measured   {target}   {count} pictures for each of {len(prompts)} prompts, seeds"
            f" {told['seeds'][0]} to {told['seeds'][1]}"
        ),
    ]


def need(asked: Asked) -> None:
    """Errors: MEASURE-01 unless what measures is on this machine."""
    from bouquet.adapter import pictures

    if asked.photos:
        pictures.need_kid(asked.kid)
    if asked.clip:
        pictures.need_clip(asked.clip)


def pairs(
    pipe: Pipeline, adapter: Adapter, config: RunConfig, prompts: Sequence[str], count: int
) -> dict[str, list[list[Image.Image]]]:
    """`count` pictures a prompt, of the base model and of the adapter, from the same seeds."""
    from app.adapter import sample

    drawn: dict[str, list[list[Image.Image]]] = {"base": [], "adapter": []}
    for name, prompt in progress.steps("drawing", [(name, prompt) for name in drawn for prompt in prompts]):
        drawn[name].append(sample.render(pipe, None if name == "base" else adapter, [prompt] * count, config))
    return drawn


def shown(value: float | dict[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['std']:.4f}" if isinstance(value, dict) else f"{value:.4f}"


def remember(
    name: str, run: Path, data: Path, models: Path, count: int, cache: Path | None, out: Path | None
) -> list[str]:
    """A site's column of memory.json, in a file of its own."""
    from bouquet.adapter import memorised
    from bouquet.report import memorisation

    out = out or Path(f"{name}.memory.json")
    with tempfile.TemporaryDirectory() as scratch:
        column = memorised.look(name, data, run, models, cache or Path(scratch), count)
    memorisation.write(out, column)
    return [memorisation.found(name, column).sentence, f"measured   {out}"]


def tell(name: str, run: Path, data: Path, models: Path, count: int, cache: Path | None, out: Path | None) -> list[str]:
    """A site's membership figures, in a file of their own."""
    from bouquet.adapter import membership

    out = out or Path(f"{name}.membership.json")
    with tempfile.TemporaryDirectory() as scratch:
        found = membership.look(name, data, run, models, cache or Path(scratch), count)
    membership.write(out, found)
    return [f"{found.site}  {membership.sentence(found)}", f"measured   {out}"]


def collect(run: Path, columns_at: list[Path]) -> list[str]:
    """memory.json in the run's folder. Errors: MEASURE-02 unless every column is of another site and of the same
    adapter.
    """
    from bouquet.report import memorisation

    columns = [memorisation.read_column(file) for file in columns_at]
    if len({column.adapter for column in columns}) > 1 or len({column.site for column in columns}) < len(columns):
        raise BouquetError(
            "MEASURE-02",
            found=", ".join(f"{column.site}: adapter {column.adapter[:12]}" for column in columns),
            fix="let every site measure the same run once: bouquet measure memory",
        )
    sites = {column.site: column.distances for column in columns}
    told = memorisation.check(memorisation.Memory(sites, run.resolve().name))
    memorisation.write(run / memorisation.FILE, told)
    found = memorisation.all_found(told)
    return [*(f"{one.site}  {one.sentence}" for one in found), f"measured   {run / memorisation.FILE}"]
