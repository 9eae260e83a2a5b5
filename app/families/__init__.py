"""Model families: one file each, found by being here, chosen by `_class_name` in a base model's model_index.json.

Enters: a folder in diffusers' layout; its settings alone are read. Leaves: its family, or a refusal by name before
anything of the model is loaded. Errors: MODEL-03 (cannot be read), MODEL-05 (none of these).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

from app import text
from app.errors import ModelError
from app.families.base import Family
from app.settings import read_json

FAMILIES: dict[str, Family] = {
    family.pipeline: family
    for module in pkgutil.iter_modules(__path__)
    if (family := getattr(import_module(f"{__name__}.{module.name}"), "FAMILY", None))
}


def of(folder: Path) -> Family:
    """The base model's family, by its name alone. Errors: MODEL-03, MODEL-05."""
    kind = read_json(folder / "model_index.json").get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise _unknown(folder, f"model_index.json says {text.line(kind, 60)}")
    return FAMILIES[kind]


def check(folder: Path) -> Family:
    """Its family, where it can be trained here. Errors: MODEL-03, MODEL-05."""
    family = of(folder)
    for why in family.reasons(folder, read_json(folder / "model_index.json")):
        raise _unknown(folder, why)
    return family


def _unknown(folder: Path, why: str) -> ModelError:
    known = ", ".join(f"{family.label} ({name})" for name, family in FAMILIES.items())
    return ModelError(
        "MODEL-05",
        found=f"{folder}: {why}",
        fix=f"choose a base model of a kind that can: {known}",
    )
