"""One quiet stream: what a run prints is our lines, and of others' their warnings and errors."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app import quiet
from bouquet import ROOT
from bouquet.flower import superexec
from bouquet.hub.following import OURS
from tests.kit.wait import PATIENT

LOUD = re.compile(r"(\x1b\[\d+m)?(WARNING|ERROR|CRITICAL)\b")  # a record of Flower's log, as its console shows it
DRIVER = """
import sys
from pathlib import Path
import pytest
from app.errors import BouquetError
from flwr.supercore.logger import log
from tests.kit import tiny
from tests.kit.memory import Federation

root, name = Path(sys.argv[1]), sys.argv[2]
federation = Federation(root, rounds=1, local_steps=1, sample_prompts="a red poppy")
if name == "empty":
    for photo in (root / "data" / "site-1").iterdir():
        photo.unlink()
tiny.models()  # it makes a base model, with bars and hints
print("\\nbegin", flush=True)
with pytest.MonkeyPatch.context() as patch:
    try:
        federation.go(patch)
    except BouquetError as error:
        log(40, "%s raised an exception", "ServerApp", exc_info=error)  # as Flower's run_serverapp does
log(30, "a warning of Flower's")
"""


def printed(folder: Path, name: str) -> list[str]:
    """Every line of a run of hub and sites, in a process of its own."""
    switches = ("FLWR_LOG_LEVEL", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "TQDM_DISABLE")
    switches += ("HF_HUB_DISABLE_PROGRESS_BARS",)
    clean = {key: value for key, value in os.environ.items() if key not in switches}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, folder, name], cwd=ROOT, env=clean | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return re.split(r"[\r\n]+", done.stdout.partition("\nbegin\n")[2].strip())


@pytest.mark.slow
def test_a_run_prints_our_lines_and_others_warnings_alone(tmp_path):
    lines = printed(tmp_path / "run", "whole")
    assert [line for line in lines if not OURS.match(line) and not LOUD.match(line)] == []
    assert "a warning of Flower's" in lines[-1]
    assert sum(line.startswith("bouquet: round 1/1") for line in lines) == 1


@pytest.mark.slow
def test_a_named_error_is_four_lines_at_the_site_and_four_at_the_hub(tmp_path):
    lines = printed(tmp_path / "run", "empty")
    site, hub = (next(n for n, line in enumerate(lines) if line.startswith(code)) for code in ("SITE-01  ", "HUB-02  "))
    for at in (site, hub):
        assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["found", "fix", "help"]
    assert lines[site + 4].startswith("bouquet: ") and LOUD.match(lines[hub + 4])  # nothing more of either
    assert not any("Traceback" in line or line.startswith('  File "') for line in lines)
    assert [line for line in lines if not OURS.match(line) and not LOUD.match(line)] == []


def test_who_asks_flower_for_more_gets_it(monkeypatch):
    log = logging.getLogger("flwr")
    before = log.level
    try:
        log.setLevel(logging.DEBUG)
        monkeypatch.setenv("FLWR_LOG_LEVEL", "INFO")
        quiet.flower()
        assert log.isEnabledFor(logging.INFO)
        monkeypatch.delenv("FLWR_LOG_LEVEL")
        quiet.flower()
        assert not log.isEnabledFor(logging.INFO) and log.isEnabledFor(logging.WARNING)
    finally:
        log.setLevel(before)


def test_who_asks_a_library_for_more_gets_it(monkeypatch):
    from transformers.utils import logging as transformers

    before = transformers.get_verbosity()
    try:
        transformers.set_verbosity_info()
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
        quiet.libraries()
        assert transformers.get_verbosity() == transformers.INFO
        monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
        quiet.libraries()
        assert transformers.get_verbosity() == transformers.ERROR
    finally:
        transformers.set_verbosity(before)


# --- a process of Flower's before it has the app ----------------------------------------------------------------------


def install_from_fab(where: str) -> str:
    print(f"Successfully installed bouquet to {where}.")
    if where == "nowhere":
        raise OSError(where)
    return where


def test_the_app_is_installed_without_a_word_unless_that_fails(capsys):
    silent = superexec.quietly(install_from_fab)
    assert silent("here") == "here" and capsys.readouterr().out == ""
    with pytest.raises(OSError):
        silent("nowhere")
    assert capsys.readouterr().out == "Successfully installed bouquet to nowhere.\n"
