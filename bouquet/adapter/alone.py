"""What a site trained alone, as a folder: an adapter for each seed that other sites may evaluate on their photos.

    DIR/alone.json                                                the site, and which runs it was trained beside
    DIR/SEED/adapter_model.safetensors, adapter_config.json       PEFT

It is an adapter, not a number: whoever has it can draw what this site's photos taught it, and may tell who was in it
(docs/models.md, "Who was in it"). So it is written only where the site's operator asks for it, and never where the site
has promised differential privacy, without whose noise it was trained, or that nobody sees its own adapter.
Enters: the folder, the runs' seeds and final adapters. Leaves: the folder, or the adapters by seed.
Errors: WORTH-03 (it is not there, of another site, or of other runs), WORTH-04 (it may not leave), ADAPTER-01, -02,
REPORT-05 (a newer version wrote it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from app import files, model, records, text
from app.adapter import store
from app.config import RunConfig
from app.errors import BouquetError
from app.families.base import Family
from app.hub import history
from app.model import Adapter
from app.records import entry
from app.site.budget import Promise
from app.site.limits import Limits

VERSION = 1
FILE = "alone.json"


@dataclass(frozen=True)
class Alone:
    """alone.json beside the adapters of one site."""

    site: str = entry("the site's name")
    runs: dict[str, str] = entry("SHA-256 of the final adapter of each run that it was trained beside, by seed")
    version: int = entry("of this format", default=VERSION)


def by_itself(config: RunConfig) -> RunConfig:
    """The run's config for a site that trains alone, which has no half to leave to others."""
    return replace(config, strategy="fedavg") if config.strategy == "alternate" else config


def check_leaves(limits: Limits, promise: Promise | None) -> None:
    """Errors: WORTH-04 where the site's own settings forbid that its adapter is seen."""
    found = (
        "SITE_PRIVACY promises noise, and this was trained without"
        if promise
        else f"SITE_LIMITS has secrecy={limits.secrecy}: nobody is to see this site's own adapter"
        if limits.secrecy
        else ""
    )
    if found:
        raise BouquetError("WORTH-04", found=found, fix="leave out --alone: the column has the losses without it")


def write(folder: Path, site: str, runs: Mapping[int, str], adapters: Mapping[int, Adapter], config: RunConfig,
          family: Family) -> None:  # fmt: skip
    """Each seed's adapter, and at last what they are. `runs`: the final adapter's hash by seed."""
    for seed, adapter in adapters.items():

        def fill(target: Path, adapter: Adapter = adapter) -> None:
            store.write_peft(target, adapter, config, family)

        store.write_folder(folder / str(seed), fill, adapter)
    files.write_json(folder / FILE, records.told(Alone(site, {str(seed): told for seed, told in runs.items()})))


def read(folder: Path, runs: Mapping[int, str], like: Adapter) -> tuple[str, dict[int, Adapter]]:
    """(the site's name, its adapters by seed), each of `like`'s shape. Errors: WORTH-03, ADAPTER-01, -02, REPORT-05."""
    try:
        told = records.read(Alone, folder / FILE)
        found = {seed: told.runs.get(str(seed)) for seed in runs}
        if found != dict(runs):
            raise _other(folder, f"{told.site} trained it beside other runs, or not all of them: {sorted(told.runs)}")
        adapters = {seed: store.read_adapter(folder / str(seed)) for seed in runs}
    except (records.Unfit, OSError, SafetensorError) as error:
        if isinstance(error, records.Unfit) and error.newer:
            raise history.refusal(error, str(folder / FILE)) from None
        raise _other(folder, str(error) or type(error).__name__) from None
    for adapter in adapters.values():
        model.check_adapter(adapter, like)
    return told.site, adapters


def read_own(folder: Path, site: str, runs: Mapping[int, str], like: Adapter) -> dict[int, Adapter] | None:
    """What this site has kept, so that it need not train again; None where there is nothing yet. Errors: as `read`,
    and WORTH-03 for another site's.
    """
    if not (folder / FILE).exists():
        return None
    whose, adapters = read(folder, runs, like)
    if whose != site:
        raise _other(folder, f"it is {whose}'s, and this is {site}")
    return adapters


def read_others(
    folders: Sequence[Path], site: str, runs: Mapping[int, str], like: Adapter
) -> dict[str, dict[int, Adapter]]:
    """By site and seed. Errors: as `read`, and WORTH-03 for this site's own or the same one's twice."""
    found: dict[str, dict[int, Adapter]] = {}
    for folder in folders:
        whose, adapters = read(folder, runs, like)
        if whose == site or whose in found:
            raise _other(folder, f"it is {whose}'s" + (", twice" if whose in found else ", which is this site"))
        found[whose] = adapters
    return found


def _other(folder: Path, found: str) -> BouquetError:
    fix = "name a folder that bouquet worth measure --alone has written, beside the same runs"
    return BouquetError("WORTH-03", found=text.line(f"{folder}: {found}"), fix=fix)
