"""Numbers about pictures, with seeds and counts. Nothing is ever downloaded.

  bouquet measure pictures RUN [--count N] [--judge] [--photos DIR [--kid inception|judge]] [--clip DIR] [--models DIR]
  bouquet measure memory NAME --data DIR RUN [--count N] [--models DIR] [--cache DIR] [--out FILE]
  bouquet measure collect RUN COLUMN...

pictures  of the base model and of RUN's adapter, N for each of the run's prompts from the same seeds: how unlike the
          pictures of one prompt are (diversity); --judge, for the demo's base model: how often the judge sees what was
          asked for; --photos: their kernel distance (KID) to the photos in DIR; --clip: CLIP score by the model in
          DIR. KID and CLIP score are torchmetrics', and need it and their weights on this machine. Goes into
          RUN/measures.json.
memory    at the site NAME: draws N pictures from its training captions and measures how near each is to one training
          photo. Only distances are in FILE (default: NAME.memory.json).
collect   at the hub: memory.json in RUN's folder, for bouquet report.

Errors: MEASURE-01 (a package or weights are not here), MEASURE-02 (columns that cannot be read or do not fit).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from app import files
from app.errors import BouquetError


def measure(asked: SimpleNamespace) -> list[str]:
    """measures.json of a run."""
    from app import model
    from app.adapter import formats, sample
    from bouquet.adapter import pictures

    if asked.photos:
        pictures.need_kid(asked.kid)
    if asked.clip:
        pictures.need_clip(asked.clip)
    adapter, config = formats.open_adapter(asked.run, models=asked.models)
    base = model.locate(config.base_model, asked.models)
    pipe = sample.pipeline(base, config)
    drawn = {
        name: [sample.render(pipe, which, [prompt] * asked.count, config) for prompt in config.prompts]
        for name, which in (("base", None), ("adapter", adapter))
    }
    told: dict[str, Any] = {
        "run": asked.run.resolve().name,
        "adapter": model.adapter_hash(adapter),
        "prompts": list(config.prompts),
        "count": asked.count,
        "seeds": [config.seed, config.seed + asked.count - 1],
        "diversity": {name: pictures.diversity(pipe, rows) for name, rows in drawn.items()},
    }
    if asked.judge:
        told["judge"] = {name: pictures.judged(config.prompts, rows) for name, rows in drawn.items()}
    if asked.photos:
        photos = pictures.photos(asked.photos, config.resolution)
        told["kid"] = {
            name: pictures.kid(sum(rows, []), photos, asked.kid, config.seed) for name, rows in drawn.items()
        }
        told["kid"] |= {"features": asked.kid, "photos": len(photos)}
    if asked.clip:
        told["clip"] = {name: pictures.clip(config.prompts, rows, asked.clip) for name, rows in drawn.items()} | {
            "model": asked.clip.name
        }
    folder = asked.run if asked.run.is_dir() else asked.run.parent
    target = (folder.parent if folder.name == "final" else folder) / "measures.json"
    target.write_text(json.dumps(told, indent=1) + "\n")
    kinds = [kind for kind in ("diversity", "judge", "kid", "clip") if kind in told]
    lines = [f"{kind:<10} base {shown(told[kind]['base'])}  adapter {shown(told[kind]['adapter'])}" for kind in kinds]
    return [
        *lines,
        (
            f"measured   {target}   {asked.count} pictures for each of {len(config.prompts)} prompts, seeds"
            f" {told['seeds'][0]} to {told['seeds'][1]}"
        ),
    ]


def shown(value: float | dict[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['std']:.4f}" if isinstance(value, dict) else f"{value:.4f}"


def remember(asked: SimpleNamespace) -> list[str]:
    from bouquet.adapter import memorised
    from bouquet.report import memorisation

    out = asked.out or Path(f"{asked.name}.memory.json")
    with tempfile.TemporaryDirectory() as scratch:
        column = memorised.look(
            asked.name, asked.data, asked.run, asked.models, asked.cache or Path(scratch), asked.count
        )
    out.write_text(json.dumps(column, indent=1) + "\n")
    return [memorisation.found(asked.name, column).sentence, f"measured   {out}"]


def collect(run: Path, columns_at: list[Path]) -> list[str]:
    """memory.json in the run's folder. Errors: MEASURE-02 unless every column is of another site and of the same
    adapter.
    """
    from bouquet.report import memorisation

    columns = [json.loads(file.read_text()) for file in columns_at]
    if len({column.get("adapter") for column in columns}) > 1 or len({column.get("site") for column in columns}) < len(
        columns
    ):
        raise BouquetError(
            "MEASURE-02",
            found=", ".join(f"{c.get('site')}: adapter {str(c.get('adapter'))[:12]}" for c in columns),
            fix="let every site measure the same run once: bouquet measure memory",
        )
    told = {"run": run.resolve().name, "sites": {column.pop("site"): column for column in columns}}
    found = memorisation.all_found(told)
    files.write_json(run / "memory.json", told)
    return [*(f"{one.site}  {one.sentence}" for one in found), f"measured   {run / 'memory.json'}"]
