"""`bouquet site start` and `stop`: the kit's own program, whose Python says here what it was asked and then waits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bouquet import ROOT, cli, dotenv
from tests.kit.wait import PATIENT, until

PYTHON = """#!/bin/sh
trap 'echo ended >>said; exit 0' TERM
printf '%s\\n' "$@" "cuda=$CUDA_VISIBLE_DEVICES" >said.new && mv said.new said
while :; do sleep 0.05; done
"""


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit that `./site init` has completed, for a host without Docker."""
    kit, environment = tmp_path / "garden", tmp_path / "bouquet" / ".venv" / "bin"
    for folder in (kit, environment, tmp_path / "photos"):
        folder.mkdir(parents=True)
    (environment / "python").write_text(PYTHON)
    (environment / "python").chmod(0o755)
    shutil.copy(ROOT / "scripts" / "site", kit / "site")
    shutil.copy(dotenv.READER, kit / "env.awk")
    (kit / "site.key").write_text("a key\n")
    (kit / ".env").write_text(
        f"SITE_NAME='garden'\nHUB='hub.example.org:8443'\nIMAGE='bouquet:cpu'\nSITE_DATA='{tmp_path}/photos'\n"
        f"SITE_GPU='none'\nBOUQUET='{tmp_path}/bouquet'\n"
    )
    return kit


def bouquet(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bouquet", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENT,
    )


def test_start_is_the_kits_supernode_in_this_process_and_stop_ends_it(kit: Path):
    """From another folder by the kit's name; stop from the kit's own."""
    command = [sys.executable, "-m", "bouquet", "site", "start", str(kit)]
    started = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        until((kit / "said").is_file, lambda: "no SuperNode", over=lambda: started.poll() is not None)
        said = (kit / "said").read_text().splitlines()
        assert said[:3] == ["-m", "bouquet.flower.supernode", "--superlink=hub.example.org:8443"]
        assert said[-1] == "cuda=" and (kit / "cache" / "pid").read_text() == f"{started.pid}\n"
        stopped = bouquet("site", "stop", cwd=kit)
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert started.wait(PATIENT) == 0 and (kit / "said").read_text().endswith("ended\n")
    finally:
        started.kill()
        started.wait()
    again = bouquet("site", "stop", str(kit), cwd=ROOT)
    assert (again.returncode, again.stdout) == (0, "this site does not run\n")


def test_stop_ends_no_process_that_has_got_the_number_of_one_that_has_ended(kit: Path):
    (kit / "cache").mkdir()
    (kit / "cache" / "pid").write_text(f"{os.getpid()}\n")
    assert bouquet("site", "stop", str(kit), cwd=ROOT).stdout == "this site does not run\n"


def test_a_kit_that_is_not_set_up_ends_with_1_and_what_to_do(kit: Path):
    (kit / "site.key").unlink()
    done = bouquet("site", "start", cwd=kit)
    assert done.returncode == 1 and done.stderr.startswith("JOIN-11  The kit is not set up.\n")


def test_a_folder_that_is_no_kit_ends_with_1_and_two_kits_are_wrong_use(tmp_path: Path, capsys):
    assert cli.main(["site", "start", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("JOIN-11  The kit is not set up.") and f"no {tmp_path}/site" in said
    assert cli.main(["site", "start", "one", "two"]) == 2
