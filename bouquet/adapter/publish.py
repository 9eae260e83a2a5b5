"""An adapter's way to Hugging Face: a final folder in; a repository with files, card and pictures out.

The steps: the base model is the run's, the sites' membership figures let it out (release.py), every file draws the same
picture (parity.py), pictures and README.md are written into the folder, and the files that are named here, no others,
go up in one commit. Without `--upload` it stops before that. The token is read by huggingface_hub alone and never
printed. Errors: EXPORT-01 to EXPORT-07, EXPORT-09, EXPORT-10, MEASURE-02, MODEL-01, MODEL-02, MODEL-04, REPORT-05.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from app import records
from app.errors import AdapterError, ModelError
from app.hub import history
from app.hub.history import PROVENANCE, Provenance
from bouquet.adapter.sample import Which

if TYPE_CHECKING:
    from app.config import RunConfig
    from app.families.base import Family
    from app.model import Adapter
    from bouquet.adapter.parity import Drawn

CARD, SHEET = "README.md", "images/before-after.png"


@dataclass(frozen=True)
class Titled:
    """What a person says of a published adapter: its repository; licence and base model, where the card cannot know."""

    repo: str
    licence: str | None
    base_id: str


def publish(
    which: Which,
    titled: Titled,
    membership: Collection[Path] = (),
    *,
    upload: bool,
    public: bool,
    name_sites: bool,
    without_membership: bool = False,
) -> None:
    """`membership`: the sites' files."""
    from app import bases, model
    from bouquet import audit
    from bouquet.adapter import card, parity, release
    from bouquet.hub import admission

    final, adapter, config, family = whole(which)
    base, provenance = bases.locate(config.base_model, which.models), history.read_provenance(final / PROVENANCE)
    under = card.licence(config, titled.licence)
    check_origin(final, adapter, base, provenance)
    sites, figures = provenance.sites, release.figures(membership, model.adapter_hash(adapter), provenance.sites)
    release.check(figures, sites, config.release_auc, without=without_membership, sending=upload)
    alike(parity.check(final, base, config))
    pictures = draw(final, adapter, base, config)
    told = provenance_for(provenance, name_sites)
    base_id = titled.base_id or bases.origin(config.base_model)
    measured = release.section(figures, called(provenance, name_sites), config.release_auc)
    page = card.card(titled.repo, config, told, pictures, under, base_id, family, measured)
    (final / CARD).write_text(page, encoding="utf-8")
    if not base_id:
        print(
            f"note     the card names no base model of the hub; --base-id OWNER/NAME says where {config.base_model} is"
        )
    files = contents(final, told, [path for _, path in pictures], family)
    for path, content in files.items():
        print(f"file     {len(content) if isinstance(content, bytes) else content.stat().st_size:>11,}   {path}")
    if upload:
        print(f"sent     {send(titled.repo, files, private=not public)}")
        if admission.ADMITTED.is_dir():  # else this machine is no hub's
            facts = {"repository": titled.repo, "adapter": model.adapter_hash(adapter), "public": public}
            audit.note(admission.ADMITTED, "published", **facts, membership=release.words(figures, sites))
    else:
        if lacking := release.missing(figures, sites):
            print(f"note     no membership figures of {', '.join(lacking)}; --upload asks for them")
        print(f"nothing was sent. Look at {final / CARD}, then: bouquet adapter publish {titled.repo} --upload")


def compare(which: Which) -> None:
    """Whether every file of a final folder draws the same picture, and nothing else. Errors: EXPORT-01, -02, -05."""
    from app import bases
    from bouquet.adapter import parity

    final, _, config, _ = whole(which)
    alike(parity.check(final, bases.locate(config.base_model, which.models), config))


def alike(rows: list[Drawn]) -> None:
    """A line for each way in which a file was loaded."""
    from bouquet.adapter import parity

    for row in rows:
        most = f"{parity.LIMIT[row.precision]:.1%}"
        differs = f"differs by {row.difference:.4%} of the adapter's effect, at most {most}"
        print(f"same     {row.path:<10}{row.precision}   {differs}")


def write_card(which: Which, titled: Titled, out: Path, membership: Collection[Path] = ()) -> None:
    """The model card alone, without pictures. Errors: EXPORT-02, EXPORT-06."""
    from app import bases, files, model
    from bouquet.adapter import card, release

    final, adapter, config, family = whole(which)
    provenance = history.read_provenance(final / PROVENANCE)
    under = card.licence(config, titled.licence)
    base_id = titled.base_id or bases.origin(config.base_model)
    figures = release.figures(membership, model.adapter_hash(adapter), provenance.sites)
    measured = release.section(figures, called(provenance, named=False), config.release_auc)
    page = card.card(titled.repo, config, provenance_for(provenance, named=False), [], under, base_id, family, measured)
    if str(out) == "-":
        print(page, end="")
    else:
        files.write(out, page)
        print(f"card     {out}")


def whole(which: Which) -> tuple[Path, Adapter, RunConfig, Family]:
    """(the final folder, with every file that one of its family has; its adapter, its run's configuration, its family).

    Errors: EXPORT-02, EXPORT-03.
    """
    from app.adapter import formats

    path = which.place
    final = path / "final" if (path / "final").is_dir() else path
    adapter, config = formats.open_adapter(final, which.base, which.models)
    family, _ = formats.family_of(config.base_model, which.models)
    missing = [name for name in (*both(family), PROVENANCE) if not (final / name).is_file()]
    if missing:
        fix = (
            "name the folder of a run that has finished; docker compose cp serverapp:/adapters ./adapters brings the"
            " runs here"
        )
        raise AdapterError("EXPORT-02", found=f"{final} lacks {', '.join(missing)}", fix=fix)
    return final, adapter, config, family


def both(family: Family) -> list[str]:
    """An adapter's files in a final folder, in both precisions."""
    from app.adapter import formats

    return [f"{folder}{name}" for folder in ("", "fp16/") for name in formats.files(family)]


def check_origin(final: Path, adapter: Any, base: Path, provenance: Provenance) -> None:
    """The adapter is the one that the provenance tells of, and the base model is the one it was trained on."""
    from app import model

    if (ours := model.adapter_hash(adapter)) != (run := provenance.adapter_sha256 or ours):
        found = f"{final}: adapter {ours[:12]}, but {PROVENANCE} tells of {run[:12]}"
        raise AdapterError(
            "EXPORT-01",
            found=found,
            fix="copy the run's final folder again",
        )
    ours, run = model.fingerprint(base)["base"], provenance.base.fingerprint if provenance.base else ""
    if run and not model.is_base(base, ours, run):
        found = f"{base} is {ours[:12]}, the run used {run[:12]}"
        raise ModelError("MODEL-04", found=found, fix="copy the hub's version")


def draw(final: Path, adapter: Any, base: Path, config: Any) -> list[tuple[str, str]]:
    """images/ with a picture for each of the run's prompts, and a sheet before and after: (prompt, path)."""
    from app.adapter import sample

    (final / "images").mkdir(exist_ok=True)
    pipe, pictures = sample.pipeline(base, config), []
    rows = [sample.render(pipe, kind, config.prompts, config) for kind in (None, adapter)]
    for number, (prompt, image) in enumerate(zip(config.prompts, rows[1], strict=True), start=1):
        image.save(final / f"images/{number}.png")
        pictures.append((prompt, f"images/{number}.png"))
    if pictures:
        sample.grid(rows, ["without", "with"], config.prompts, cell=max(128, min(256, config.resolution))).save(
            final / SHEET
        )
    return pictures


def called(provenance: Provenance, named: bool) -> dict[str, str]:
    """What each site is called for everybody: by a number, unless its name was asked for."""
    return {site: site if named else f"site {number}" for number, site in enumerate(provenance.sites, start=1)}


def provenance_for(provenance: Provenance, named: bool) -> Provenance:
    """What of the provenance is for everybody: no site's name, unless that was asked for."""
    if named:
        return provenance
    numbers, personal = called(provenance, named), provenance.personal
    return replace(
        provenance,
        personal=personal and replace(personal, site=numbers.get(personal.site, "a site")),
        sites={name: provenance.sites[site] for site, name in numbers.items()},
        config={key: value for key, value in provenance.config.items() if key != "sites"},  # those that the run asked
    )


def contents(final: Path, public: Provenance, pictures: list[str], family: Family) -> dict[str, Path | bytes]:
    """Every file that goes up, by its path in the repository. Whatever else lies in the folder stays."""
    names = [CARD, *both(family), *pictures, *([SHEET] if pictures else [])]
    return {name: final / name for name in names} | {
        PROVENANCE: (json.dumps(records.told(public), indent=1) + "\n").encode()
    }


def send(repo: str, files: dict[str, Path | bytes], private: bool) -> str:
    """One commit with all files; returns its address. Errors: EXPORT-07."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not get_token():
        raise refused("this machine has no token of the hub")
    api = HfApi()
    disable_progress_bars()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in files.items()
        ]
        return api.create_commit(repo, operations, commit_message="Adapter, card and pictures").commit_url
    # the hub's and the network's, a card's, an object's
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise refused(words(error)) from error


def words(error: BaseException) -> str:
    """What went wrong, and what the hub said to it; where an object failed, the reason is behind the error."""
    if isinstance(error, RuntimeError) and error.__cause__:
        return f"{error} {words(error.__cause__)}"
    reply = getattr(error, "response", None)
    status = f" {reply.status_code}" if reply is not None else ""
    return f"{type(error).__name__}{status}: {getattr(error, 'server_message', None) or error}"


def refused(found: str) -> AdapterError:
    fix = (
        "give HF_TOKEN, or HF_TOKEN_PATH with a file, a token that may write to this owner's repositories; then run"
        " this again"
    )
    return AdapterError("EXPORT-07", found=found, fix=fix)
