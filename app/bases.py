"""Base models by name: the folder of each, among those that are here or fetched from where it is known to be.

Enters: a base model's name and the folder of base models. Leaves: its folder. Errors: MODEL-01 (unknown name), MODEL-02
(not on this machine).
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

from app import families
from app.errors import ModelError

GATED = "; its licence has to be accepted there first, and HF_TOKEN set to a token of who did"
UNUSED = ["*.bin", "*fp16*", "*non_ema*", "*.msgpack", "*.onnx*", "*openvino*"]  # what a repository has beside it


def locate(name: str, models: Path) -> Path:
    """The folder of base model `name`: `models/name`, else the pinned revision of a known repository."""
    fetched = {name: family for family in families.FAMILIES.values() for name in family.repositories}
    known = sorted({*fetched, *(p.parent.name for p in models.glob("*/model_index.json"))})
    if Path(name).name != name or name not in known:
        raise ModelError(
            "MODEL-01",
            found=f"base-model = {name!r}{_instead(name, models)}; known here: {', '.join(known) or 'none'}",
            fix=(
                "choose a known name, or put the model in diffusers layout into a folder of that name among the base"
                " models"
            ),
        )
    folder = models / name
    if (folder / "model_index.json").exists():
        return folder
    from huggingface_hub import snapshot_download

    repository = fetched[name].repositories[name]
    _tell_of_download(name)
    try:
        allow = [f"{part}/*" for part in fetched[name].parts] + ["model_index.json"]
        return Path(
            snapshot_download(
                repository.name, revision=repository.revision, allow_patterns=allow, ignore_patterns=UNUSED
            )
        )
    except Exception as error:
        raise ModelError(
            "MODEL-02",
            found=(
                f"no folder {folder}, and {repository.name} at {repository.revision[:8]} cannot be fetched"
                f" ({type(error).__name__})"
            ),
            fix=f"put the model into {folder}, or allow this machine to reach Hugging Face{GATED * repository.gated}",
        ) from error


def origin(name: str) -> str:
    """Hugging Face's name of a known repository, or ''."""
    known = (family.repositories for family in families.FAMILIES.values())
    return next((repositories[name].name for repositories in known if name in repositories), "")


@cache
def _tell_of_download(name: str) -> None:
    """Once a process: gigabytes may come now, and nothing else would say so."""
    said = f"bouquet: {name} is not among the base models here; what this host lacks of it is fetched now"
    print(said, file=sys.stderr, flush=True)


def _instead(name: str, models: Path) -> str:
    """What lies there under that name and is no base model, or ''."""
    place = models / name
    if Path(name).name != name or len(name) > 200:
        return ""
    if place.is_symlink() and not place.exists():
        return f", and {place} is a link that leads nowhere on this machine"
    if place.is_dir():
        return f", and {place} has no model_index.json"
    if files := [path for end in ("", ".safetensors", ".ckpt") if (path := models / f"{name}{end}").is_file()]:
        how = "StableDiffusionPipeline.from_single_file and save_pretrained make a folder of it"
        return f", and {files[0]} is a checkpoint in one file: {how}"
    return ""
