"""Was joining worth it? Base, each site alone, federated and pooled, judged on the same prompts and seeds.

    python -m models.mini.compare --run .bouquet/adapters/latest --data .bouquet/data

Enters: a finished run of the demo and its sites' photos. Leaves: `comparison.json`, `comparison.md` (the README's
table) and `comparison.png` (the README's picture) in `--out`. "Alone" takes as many steps on one site's photos as a
site takes in the run; "pooled" takes all sites' steps on all sites' photos, in one place: what federation is to match.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from app import model, records
from app.adapter import sample, store
from app.config import RunConfig
from app.hub import history
from app.site import train
from bouquet import worth
from models.mini import draw
from models.mini.judge import judge

HERE = Path(__file__).parent
GROUPS = {"known": draw.KNOWN, "site 1's": draw.UNSEEN[1], "site 2's": draw.UNSEEN[2]}
PICTURED = (
    "a red tulip, meadow background",
    "a yellow daisy, night background",
    "a red poppy, meadow background",
    "a white lily, night background",
)
PICTURED += ("a pink lotus, sky background", "a purple thistle, sand background")


def alone(folder: Path, config: RunConfig, cached: Path) -> model.Adapter:
    """The config's rounds of local steps on one folder of photos, from the run's first adapter, without a hub."""
    site = train.Site(config, HERE.parent, folder, cached, "")
    model.apply_adapter(site.net, model.new_adapter(HERE, config))
    for number in range(1, config.rounds + 1):
        loss = site.fit(site.privacy.seed(config.seed, folder.name, number), number)
        print(f"{folder.name}  round {number}/{config.rounds}  train {loss:.4f}", flush=True)
    return model.adapter_of(site.net)


def pool(folders: list[Path], target: Path) -> Path:
    """All sites' photos and captions in one folder."""
    target.mkdir()
    lines = []
    for folder in folders:
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            name = f"{folder.name}-{row['file_name']}"
            shutil.copyfile(folder / row["file_name"], target / name)
            lines.append(json.dumps({"file_name": name, "text": row["text"]}))
    (target / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return target


def prompts(species: str, count: int) -> list[str]:
    rng = np.random.default_rng(sum(species.encode()))
    choose = lambda names: str(rng.choice(list(names)))  # noqa: E731
    return [draw.caption(species, choose(draw.COLOURS), choose(draw.BACKGROUNDS)) for _ in range(count)]


def score(pipe, adapter: model.Adapter | None, config: RunConfig, count: int) -> dict[str, float]:
    """Share of pictures in which the judge sees the species that was asked for, by species."""
    right = {}
    for species in draw.SPECIES:
        images = sample.render(pipe, adapter, prompts(species, count), config, seed=1000)
        right[species] = sum(seen == species for seen in judge(images)) / count
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds site-1 and site-2")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table and the picture go")
    parser.add_argument("--count", type=int, default=16, help="pictures a species")
    asked = parser.parse_args()
    told = history.read(asked.run / history.FILE)
    config = worth.config_of(told, asked.run)
    folders = [asked.data / "site-1", asked.data / "site-2"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        contenders: dict[str, model.Adapter | None] = {"base": None}
        for i, folder in enumerate(folders, 1):
            contenders[f"site {i} alone"] = alone(folder, config, work / f"cache-{i}")
        contenders["federated"] = store.read_adapter(asked.run / "final")
        longer = replace(config, rounds=2 * config.rounds)
        contenders["pooled"] = alone(pool(folders, work / "pooled"), longer, work / "cache-pooled")
    pipe = sample.pipeline(HERE, config)
    scores, rows = {}, []
    for name, adapter in contenders.items():
        scores[name] = score(pipe, adapter, config, asked.count)
        rows.append(sample.render(pipe, adapter, PICTURED, config))
        print(name, {group: f"{mean(scores[name], group):.0%}" for group in GROUPS}, flush=True)
    sample.grid(rows, list(contenders), PICTURED).save(asked.out / "comparison.png")
    (asked.out / "comparison.md").write_text(table(scores))
    facts = {"run": told.run, "base": records.told(told.base), "pictures_a_species": asked.count, "accuracy": scores}
    (asked.out / "comparison.json").write_text(json.dumps(facts, indent=1) + "\n")


def mean(scores: dict[str, float], group: str) -> float:
    return sum(scores[species] for species in GROUPS[group]) / len(GROUPS[group])


def table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each contender, the mean of each group, then each unseen species."""
    unseen = [*draw.UNSEEN[1], *draw.UNSEEN[2]]
    heads = ["", "8 known species", "site 1's two", "site 2's two", *unseen]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, by_species in scores.items():
        cells = [mean(by_species, group) for group in GROUPS] + [by_species[s] for s in unseen]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
