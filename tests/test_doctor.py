"""What a person does when something of the host is in the way: scripts/doctor, scripts/demo --clean; and clones made in
other ways.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import copy_project, sh
from PIL import Image

from app.errors import BouquetError
from bouquet import ROOT, demo
from bouquet.adapter import sample
from bouquet.ended import quietly
from bouquet.hub import kit as kit_
from bouquet.site.preflight import Line


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return copy_project(tmp_path / "bouquet")


def lines(copy: Path, check: str, **env: str) -> list[tuple[str, str]]:
    """(state, text) of the doctor's lines of one check."""
    shown = sh("scripts/doctor", copy, check=False, **env).stdout
    return [
        (state, text)
        for state, name, text in re.findall(r"^(pass|warn|fail)  (\S+) +(.*)$", shown, re.MULTILINE)
        if name == check
    ]


# --- the doctor
# --------------------------------------------------------------------------------------------------------------


def test_the_doctor_needs_no_packages_changes_nothing_and_ends_with_a_verdict(copy: Path) -> None:
    (copy / ".venv").unlink()
    before = sorted(copy.rglob("*"))
    done = sh("scripts/doctor", copy, check=False)
    *told, verdict = done.stdout.splitlines()
    fails = [line for line in told if line.startswith("fail")]
    assert re.match(r"(not )?ready: \d+ pass", verdict) and done.returncode == bool(fails) == verdict.startswith(
        "not ready"
    ), done.stdout
    assert sorted(copy.rglob("*")) == before


def test_the_doctors_lines_look_like_the_preflights(copy: Path) -> None:
    (copy / ".env").write_text("HUB_PROT=8443\n")
    shown = sh("scripts/doctor", copy, check=False).stdout
    assert (
        str(Line(".env", "warn", "nothing here asks for HUB_PROT", "a misspelt name? docs/hub.md names the settings"))
        in shown
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("pass", "0 settings, each means something")),
        (
            "HUB_HOST=h\nSITE_1_LIMITS=x\nHUB_MEMORY=16g\nCOMPOSE_PROJECT_NAME=b\n",
            ("pass", "4 settings, each means something"),
        ),
        ("HUB_PROT=8443\n", ("warn", "nothing here asks for HUB_PROT")),
        ("SITE_7_DATA=/nowhere at all\n", ("warn", "SITE_7_DATA=/nowhere at all is no folder")),
        ("SITE_2_GPU=0,1\n", ("fail", "SITE_2_GPU=0,1")),
        ("HUB_HOST='h\n", ("fail", ".env, line 1: a quotation mark is not closed")),
    ],
)
def test_the_doctor_reads_the_settings(copy: Path, text: str, expected: tuple[str, str]) -> None:
    (copy / ".env").write_text(text)
    assert expected in lines(copy, ".env")


def test_the_doctor_sees_ports_proxies_and_what_the_environment_overrides(copy: Path) -> None:
    (copy / ".env").write_text("HUB_PORT=8500\n")
    assert ("fail", "CONTROL_PORT=x is no port's number") in lines(copy, "ports", CONTROL_PORT="x")
    assert ("warn", "HUB_PORT is 8600 in the environment, which counts, and 8500 in .env") in lines(
        copy, ".env", HUB_PORT="8600"
    )
    [(state, told)] = lines(
        copy, "proxies", HTTPS_PROXY="http://anna:geheim@p:1", DOCKER_CONFIG="/nowhere", NO_PROXY=""
    )
    assert state == "warn" and "127.0.0.1" in told and "geheim" not in told
    assert lines(
        copy, "proxies", HTTPS_PROXY="http://p:1", NO_PROXY="a, 127.0.0.1,localhost", DOCKER_CONFIG="/nowhere"
    ) == [("pass", "HTTPS_PROXY; NO_PROXY spares this host")]


def test_the_doctor_looks_at_the_certificates(copy: Path) -> None:
    assert lines(copy, "certs") == [("pass", "there are none yet; scripts/setup makes them")]
    sh("scripts/certs", copy)
    [(state, told)] = lines(copy, "certs")  # 397 days, less the moment since
    assert state == "pass" and re.fullmatch("the hub's certificate has its names and holds for 39[67] days", told)
    assert lines(copy, "certs", HUB_HOST="hub.example.org")[0][0] == "fail"


@pytest.mark.parametrize(
    ("engine", "compose", "state", "words"),
    [
        ("26.1.5", "2.26.1-4", "pass", "Docker Engine 26.1.5"),
        ("24.0.7", "2.26.1", "fail", "start_interval"),
        ("26.1.5", "v2.20.0", "fail", "2.20.0"),
        ("26.1.5", "", "fail", "without Compose v2"),
    ],
)
def test_the_doctor_knows_which_docker_is_too_old(
    copy: Path, tmp_path: Path, engine: str, compose: str, state: str, words: str
) -> None:
    """A stand-in that says its version."""
    stand_in = tmp_path / "bin/docker"
    stand_in.parent.mkdir()
    asks = (
        f"case $1 in info) ;; version) echo {engine} ;; compose) {f'echo {compose}' if compose else 'exit 1'} ;; *)"
        " exit 1 ;; esac"
    )
    stand_in.write_text(f"#!/bin/sh\n{asks}\n")
    stand_in.chmod(0o755)
    [(said, told)] = lines(copy, "docker", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert said == state and words in told


# --- beginning anew
# ----------------------------------------------------------------------------------------------------------

ALONE = {"PATH": "/usr/bin:/bin", "DOCKER_HOST": "unix:///nowhere"}  # no Docker Engine answers


def used(copy: Path) -> Path:
    """A clone in which a demo has run: settings, keys, runs, photos, a kit."""
    sh("scripts/certs", copy)
    (copy / ".env").write_text("HUB_PORT=8443\nSITE_1_DATA=./.bouquet/data/site-1\n")
    for name in ("data/site-1/1.png", "adapters/7/final/x", "state/superlink.db", "kits/garden/.env", "engine"):
        (copy / ".bouquet" / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / ".bouquet" / name).write_text("process\n")
    return copy


def left(copy: Path) -> set[str]:
    return (
        {str(path.relative_to(copy)) for path in (copy / ".bouquet").rglob("*") if path.is_file()}
        if (copy / ".bouquet").exists()
        else set()
    )


def test_nothing_is_removed_without_a_yes(copy: Path) -> None:
    before = left(used(copy))
    told = sh("scripts/demo --clean </dev/null", copy, check=False, **ALONE)
    assert (
        told.returncode == 1
        and "HOST-17" in told.stdout
        and ".bouquet/adapters" in told.stdout
        and "certs/ (keys" in told.stdout
    )
    assert left(copy) == before


def test_clean_removes_what_the_clone_has_made_and_no_key(copy: Path) -> None:
    used(copy)
    keys = {path: path.read_bytes() for path in (copy / "certs").rglob("*") if path.is_file()}
    told = sh("scripts/demo --clean --yes", copy, **ALONE).stdout
    assert not (copy / ".bouquet").exists() and "demo: clean" in told
    assert {path: path.read_bytes() for path in (copy / "certs").rglob("*") if path.is_file()} == keys
    assert (copy / ".env").read_text().startswith("HUB_PORT=8443") and (copy / ".venv").exists()
    sh("scripts/demo --clean --yes", copy, **ALONE)  # nothing is there any more


def test_clean_leaves_a_sites_own_key_and_photos_that_somebody_put_there(copy: Path) -> None:
    used(copy)
    (copy / ".bouquet/kits/garden/site.key").write_text("the only copy")
    (copy / ".bouquet/mine").mkdir()
    (copy / ".bouquet/mine/1.png").write_text("a photo")
    with (copy / ".env").open("a") as settings:
        settings.write("SITE_2_DATA=.bouquet/mine\n")
    told = sh("scripts/demo --clean --yes", copy, **ALONE).stdout
    assert left(copy) == {f".bouquet/{name}" for name in ("kits/garden/.env", "kits/garden/site.key", "mine/1.png")}
    assert "where a site's own key is" in told and "where SITE_2_DATA is" in told


def test_clean_ends_the_processes_that_a_kept_deployment_left(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # ps would cut its lines
    used(copy)
    process = subprocess.Popen(
        ["bash", "-c", f": {copy}/certs; read -r _"], stdin=subprocess.PIPE, start_new_session=True
    )
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    try:
        (copy / ".bouquet/state/pids.json").write_text(f'{{"superlink": {process.pid}}}')
        told = sh("scripts/demo --clean --yes", copy, **(ALONE | {"FLWR_HOME": str(copy)})).stdout
        assert "ending the processes" in told
        reaper.join(timeout=10)
        assert process.returncode == -signal.SIGTERM
    finally:
        process.stdin.close()  # which ends it
        reaper.join()


def test_clean_removes_the_containers_and_volumes_of_this_folder_and_no_others(docker: None, copy: Path) -> None:
    used(copy)
    own, shared, image = f"bouquet-clean-{os.getpid()}", f"bouquet-shared-{os.getpid()}", f"bouquet-empty-{os.getpid()}"
    label = "--label com.docker.compose.project"
    made = {  # container: (project, folder)
        f"{own}-1": (own, copy), f"{shared}-1": (shared, copy), f"{shared}-2": (shared, "/somewhere/else"),
    }  # fmt: skip
    try:
        sh(f"tar -c -T /dev/null | docker import - {image}", copy)
        for name, (project, folder) in made.items():
            sh(f"docker create --name {name} {label}={project} {label}.working_dir={folder} {image} x", copy)
        for project in (own, shared):
            sh(f"docker volume create {label}={project} {project}_state", copy)
        told = sh("scripts/demo --clean --yes", copy).stdout
        assert sh(
            f"docker ps -a --format '{{{{.Names}}}}' --filter name={own} --filter name={shared}", copy
        ).stdout.split() == [f"{shared}-2"]
        assert sh(f"docker volume ls -q --filter name={own} --filter name={shared}", copy).stdout.split() == [
            f"{shared}_state"
        ]
        assert f"{shared}'s volumes, which /somewhere/else uses" in told
    finally:
        sh(
            f"docker rm -f {' '.join(made)}; docker volume rm {own}_state {shared}_state; docker rmi {image}",
            copy,
            check=False,
        )


# --- signs of life
# -----------------------------------------------------------------------------------------------------------


def test_a_step_without_a_terminal_says_that_it_goes_on_and_leaves_no_process(copy: Path) -> None:
    """The clock's ten seconds are made a hundredth of that."""
    library = copy / "scripts/_lib.sh"
    library.write_text(library.read_text().replace("read -r -t 10 ", "read -r -t 0.1 "))
    begun = time.monotonic()
    shown = sh(
        "set -euo pipefail; . scripts/_lib.sh; ABOUT=([image]='one to ten minutes'); step image sleep 0.6", copy
    ).stdout.splitlines()
    assert shown[0].endswith("image, one to ten minutes") and sum(" s so far" in line for line in shown) >= 2
    assert time.monotonic() - begun < 8  # whoever reads to the end waits for no helper
    failed = sh("set -euo pipefail; . scripts/_lib.sh; step image false; echo never", copy, check=False)
    assert failed.returncode == 1 and "never" not in failed.stdout


def test_the_demo_says_what_it_waits_for_until_it_is_heard(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "EVERY", 0.01)
    monkeypatch.setattr(demo, "TIMES", [])
    heard_of, count = [], 0
    monkeypatch.setattr(demo, "say", heard_of.append)
    with demo.timed("start", "for every site to be online") as heard:
        while len(heard_of) < 3:
            time.sleep(0.01)
        heard.set()
        count = len(heard_of)
    assert heard_of[0] == "start" and heard_of[1] == "start, 0 s so far: waiting for every site to be online"
    assert len(heard_of) <= count + 1 and [name for name, _ in demo.TIMES] == ["start"]


# --- clones
# ------------------------------------------------------------------------------------------------------------------


def test_a_clone_that_git_for_windows_makes_has_the_same_bytes(copy: Path, tmp_path: Path) -> None:
    git = "git -c user.name=x -c user.email=x@example.org -c core.autocrlf=true"
    sh(
        f"rm .venv && git init -q && git add -A 2>/dev/null && {git} commit -q -m all && {git} clone -q ."
        f" {tmp_path}/clone",
        copy,
    )
    names = sh("git ls-files -z", copy).stdout.split("\0")[:-1]
    assert (
        len(names) > 200
        and [name for name in names if (copy / name).read_bytes() != (tmp_path / "clone" / name).read_bytes()] == []
    )
    assert [
        name
        for name in names
        if name.endswith((".png", ".safetensors"))
        and "binary: set" not in sh(f"git check-attr binary -- '{name}'", copy).stdout
    ] == []


def test_set_up_makes_files_that_the_containers_user_may_read_whatever_the_umask_is(copy: Path) -> None:
    """Not the private ones."""
    sh(
        "umask 077; bash -c 'set -euo pipefail; . <(sed -n 2,15p scripts/setup | grep ^umask); mkdir made; touch"
        " made/file'",
        copy,
    )
    assert (copy / "made").stat().st_mode & 0o777 == 0o755 and (copy / "made/file").stat().st_mode & 0o777 == 0o644
    sh("umask 022; scripts/certs", copy)
    assert {path.stat().st_mode & 0o777 for path in (copy / "certs").glob("*.key")} == {0o600}


# --- places that cannot be written
# -----------------------------------------------------------------------------------------------


def test_a_kit_that_cannot_be_written_and_pictures_that_cannot_are_named(copy: Path, tmp_path: Path) -> None:
    sh("scripts/certs && mkdir -p .bouquet && touch .bouquet/kits", copy)  # a file in the folder's place
    told = sh("scripts/bouquet hub invite garden --hub localhost:8443", copy, check=False)
    assert told.returncode == 1 and told.stdout.startswith("JOIN-14  The kit cannot be written.\n"), told.stdout
    for place, kinds in ((copy / ".bouquet/kits/sheet.png", ()), (tmp_path / "sheet.xyz", (ValueError,))):
        with pytest.raises(BouquetError, match="EXPORT-08") as caught, sample.writing(place, *kinds):
            Image.new("RGB", (8, 8)).save(place)
        assert str(place) in caught.value.found


@pytest.mark.slow
def test_a_kit_is_never_written_through_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    (copy / ".bouquet/kits/garden").mkdir(parents=True)
    for name in ("garden.tar.gz", "garden/README.md"):
        (copy / ".bouquet/kits" / name).symlink_to(tmp_path / "file")
    (copy / ".bouquet/kits/orchard").symlink_to(tmp_path / "folder")
    sh("scripts/certs && scripts/bouquet hub invite garden --hub localhost:8443", copy)
    assert (tmp_path / "file").read_text() == "somebody's" and (
        copy / ".bouquet/kits/garden/README.md"
    ).read_text().startswith("# garden joins")
    told = sh("scripts/bouquet hub invite orchard --hub localhost:8443", copy, check=False)
    assert told.returncode == 1 and "JOIN-14" in told.stdout and list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("hub", ["https://localhost:8443", "localhost", "localhost:http", "lo calhost:8443", ":8443"])
def test_an_address_that_is_none_is_named_before_a_kit_is_made(copy: Path, hub: str) -> None:
    told = sh(f"scripts/bouquet hub invite garden --hub '{hub}'", copy, check=False)
    assert told.returncode == 1 and told.stdout.startswith(("CERT-05", "HOST-15")) and "--hub" in told.stdout, (
        told.stdout
    )
    assert not (copy / ".bouquet/kits").exists()


def test_a_key_that_the_operators_container_does_not_see_is_not_made_there_anew(copy: Path) -> None:
    """Whether the publishers that sites pin are known there or not."""
    sh("mkdir -p certs && touch certs/trusted.yaml", copy)
    for _ in range(2):
        told = sh("scripts/bouquet hub sign", copy, check=False, BOUQUET_OPERATOR="1")
        assert (
            told.returncode == 1 and told.stdout.startswith("TRUST-02") and "operator bouquet hub sign" in told.stdout
        )
        assert not (copy / "certs/publisher.key").exists()
        (copy / "certs/trusted.yaml").unlink(missing_ok=True)


def test_what_a_terminal_has_no_sign_for_is_shown_as_a_question_mark() -> None:
    code = "from bouquet.ended import quietly; quietly(lambda: print('a \ufffd rose'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True) == "a ? rose\n"


def test_who_reads_no_more_ends_a_command_without_a_traceback(copy: Path) -> None:
    told = sh("scripts/certs; scripts/bouquet hub sign | head -1", copy)
    assert "Traceback" not in told.stdout and "sign: bundle" in told.stdout


ENDED = "import sys; sys.path.insert(0, '.'); from bouquet.ended import quietly\n"


@pytest.mark.parametrize(
    "main",
    [
        "lambda: [print('x' * 100) for _ in range(10_000)] and 0",  # more than a pipe holds
        "lambda: print('one line that is only written at the end')",
    ],
)
def test_an_output_that_nobody_reads_ends_any_command_with_141_and_no_word(main: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", f"{ENDED}sys.exit(quietly({main}))"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_connection_that_breaks_is_no_reader_that_has_gone() -> None:
    def main() -> None:
        raise BrokenPipeError("the hub's end")

    with pytest.raises(BrokenPipeError, match="the hub's end"):
        quietly(main)


def test_every_python_command_of_scripts_ends_that_way() -> None:
    commands = [
        path
        for path in ROOT.glob("scripts/**/*")
        if path.is_file() and "\n    sys.exit(main())" in path.read_text(errors="replace")
    ]
    assert {str(path.relative_to(ROOT)) for path in commands} <= {"bouquet/demo.py"}  # which has its own way


# --- an invitation that is cut off
# --------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_while_a_kit_is_written_is_named_and_the_kit_that_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = tmp_path / "garden.tar.gz"
    kit.write_bytes(b"the one before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kit_.place(kit, b"half of it", 0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["garden.tar.gz"] and kit.read_bytes() == b"the one before"


def test_an_invitation_after_one_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit_, "KITS", tmp_path)
    (tmp_path / ".garden.tar.gz.half").write_bytes(b"ha")
    kit_.place(tmp_path / "garden.tar.gz", b"whole", 0o644)
    assert [path.name for path in tmp_path.iterdir()] == ["garden.tar.gz"]


def test_a_base_of_a_kind_that_cannot_be_trained_is_named_before_there_is_a_kit(copy: Path) -> None:
    index = copy / "models/mini/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    told = sh("scripts/certs && scripts/bouquet hub invite garden --hub localhost:8443", copy, check=False)
    assert (
        told.returncode == 1
        and "MODEL-05" in told.stdout
        and "FluxPipeline" in told.stdout
        and not (copy / ".bouquet/kits").exists()
    )
