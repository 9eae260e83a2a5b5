"""Families of base models as the docs tell of them, and a preset for each: names, licences, settings are the app's."""

from __future__ import annotations

import re
import tomllib

import pytest

from app import families
from app.config import RunConfig
from app.families import sd
from app.families.base import Family, Repository
from bouquet import ROOT

PRESETS = {path.stem: path for path in sorted((ROOT / "app" / "presets").glob("*.toml"))}
KNOWN = {name: (family, it) for family in families.FAMILIES.values() for name, it in family.repositories.items()}
GIGABYTES = re.compile(r"(\d+) GB(?: to fetch|\.)")


def preset(name: str) -> RunConfig:
    return RunConfig.read(tomllib.loads(PRESETS[name].read_text()))


def family_of(base_model: str) -> Family:
    """A known repository's; `mini` ships with Bouquet and is of Stable Diffusion's."""
    return sd.FAMILY if base_model == "mini" else KNOWN[base_model][0]


def rows(page: str) -> list[list[str]]:
    """The cells of a page's table of families, without its head."""
    [table] = re.findall(r"<!-- families -->\n(.*?)<!-- /families -->", (ROOT / page).read_text(), re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def licence(repository: Repository) -> str:
    return repository.licence + ", gated" * repository.gated


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_base_model_is_known_and_its_family_has_what_the_preset_asks_for(name):
    config = preset(name)
    family_of(config.base_model).check_run(config)


def test_every_base_model_that_is_fetched_has_one_preset():
    assert sorted(preset(name).base_model for name in PRESETS) == sorted(["mini", *KNOWN])


def test_the_readmes_families_are_the_apps_with_their_base_models_and_licences():
    told = [(family, base.strip("`"), under) for family, base, under, _ in rows("README.md")]
    assert sorted(told) == sorted((family.label, name, licence(it)) for name, (family, it) in KNOWN.items())


def test_the_pages_families_are_the_apps_with_where_each_base_model_is_fetched_from():
    told = [(family, base.strip("`"), *at) for family, base, *at in (row[:5] for row in rows("docs/models.md"))]
    wanted = [(family.label, name, it.name, it.revision, licence(it)) for name, (family, it) in KNOWN.items()]
    assert sorted(told) == sorted(wanted)


def test_the_page_names_each_base_models_preset_and_the_file_that_its_family_has_for_comfyui():
    for _, base, *_, shown, file in rows("docs/models.md"):
        name = re.fullmatch(r"\[([\w-]+)\]\(\.\./app/presets/\1\.toml\)", shown)[1]
        assert preset(name).base_model == base.strip("`")
        assert (file == "`kohya.safetensors`") == family_of(preset(name).base_model).kohya


def test_both_tables_and_the_presets_say_the_same_gigabytes():
    readme = {base.strip("`"): size for _, base, _, size in rows("README.md")}
    assert readme == {row[1].strip("`"): row[5] for row in rows("docs/models.md")}
    said = {preset(name).base_model: GIGABYTES.search(path.read_text()) for name, path in PRESETS.items()}
    found = {name: size[1] for name, size in said.items() if size}
    assert found == {name: readme[name] for name in found} and len(found) == len(KNOWN) - 1  # sd15 says none
