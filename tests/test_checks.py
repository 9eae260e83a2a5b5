"""scripts/check, and the hooks that call it before a commit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import copy_project, sh

from bouquet import ROOT

CHECKS = ["format", "lint", "types", "quick"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a module that nothing is right about."""
    folder = copy_project(tmp_path_factory.mktemp("checks") / "bouquet")
    (folder / "app" / "thorn.py").write_text("import os\nx:int = 'a'\n")
    return folder


def test_what_is_wrong_is_named_and_each_check_is_made_whatever_the_others_find(copy: Path) -> None:
    done = sh("scripts/check format lint", copy, check=False)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "check: not as it should be: format lint"
    assert "1 file would be reformatted" in done.stdout and "F401" in done.stdout and "app/thorn.py:1:8" in done.stdout


def test_a_wrong_type_is_named_and_a_tests_call_of_what_is_not_there(copy: Path) -> None:
    for module in (path for folder in ("app", "bouquet", "tests") for path in copy.glob(f"{folder}/**/*.py")):
        if module.name not in ("__init__.py", "thorn.py"):  # of all of them the check itself takes minutes
            module.unlink()
    (copy / "tests" / "test_thorn.py").write_text("from app import thorn\n\n\ndef test_it():\n    thorn.gone()\n")
    done = sh("scripts/check types", copy, check=False)
    assert done.returncode == 1 and "app/thorn.py:2: error: Incompatible types in assignment" in done.stdout
    assert 'tests/test_thorn.py:5: error: Module has no attribute "gone"' in done.stdout


def test_what_is_no_check_is_refused_with_those_that_there_are(copy: Path) -> None:
    done = sh("scripts/check speling", copy, check=False)
    assert done.returncode == 2 and done.stdout.startswith("What can be known of a change")
    assert re.findall(r" {2,}(\w+)  ", done.stdout) == CHECKS


def test_the_hooks_before_a_commit_are_these_checks() -> None:
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [f"scripts/check {name}" for name in CHECKS]
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
