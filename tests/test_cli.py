"""`bouquet`: what it says of itself, its exit codes, what it does not wait for, and the names it had before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer
from conftest import sh

from bouquet import ROOT, __version__, cli
from tests.kit.wait import PATIENT

BEFORE = {  # the name of one release: what it is now
    "hub": "hub", "report": "report", "sample": "adapter sample", "publish": "adapter publish", "measure": "measure",
    "worth": "worth", "live": "hub page", "partition": "data partition",
}  # fmt: skip


def commands(group: click.Command | None = None, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    """Every command by its words."""
    group = group or typer.main.get_command(cli.bouquet)
    if not isinstance(group, click.Group):
        return {words: group}
    return {
        name: one for word, inner in group.commands.items() for name, one in commands(inner, (*words, word)).items()
    }


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_says_what_it_does_and_what_each_option_means(words, capsys):
    command = commands()[words]
    assert cli.main([*words, "--help"]) == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert command.help and command.help.split()[0] in shown
    silent = [
        option.name
        for option in command.params
        if isinstance(option, click.Option) and not option.help and not option.hidden
    ]
    assert silent == []


def test_nothing_asked_is_wrong_use_and_shows_what_there_is(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("hub", "site", "report", "adapter", "measure", "worth", "data"))
    assert cli.main(["hub"]) == 2 and "invite" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked",
    [
        "hub admit garden", "hub invite", "hub status not-a-number", "hub nothing", "report --follow --out -",
        "adapter sample --strength 2", "adapter sample --grid --strength 0.5", "data partition --dataset mini --by iid",
        "data partition --by colour", "data partition --sites 0", "data class-images --out here",
        "data class-images --out here --prompts nowhere.txt", "measure pictures run --kid other",
        "measure pictures run --count 1", "adapter publish flowers", "adapter card", "adapter parity here",
        "--nonsense",
    ],
)  # fmt: skip
def test_wrong_use_ends_with_2_before_anything_is_done(asked, capsys):
    assert cli.main(asked.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err and said.err


def test_what_fails_ends_with_1_and_its_code_found_and_fix(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert cli.main(["hub", "sites"]) == 1
    assert re.match(r"HOST-08  .+\n  found  .+\n  fix    .+\n  help   .+\n$", capsys.readouterr().err)
    assert cli.main(["hub", "invite", "Not A Name"]) == 1
    assert capsys.readouterr().err.startswith("CERT-04")


def test_what_needs_a_clone_says_so_in_the_image(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.common, "ROOT", tmp_path)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("HOST-18  This is not in the image.")


def test_the_doctor_and_the_demo_are_the_programs_that_work_before_python_is_there():
    assert sh("scripts/bouquet doctor --nonsense; scripts/bouquet demo --nonsense", ROOT, check=False).stdout == (
        sh("scripts/doctor --nonsense; scripts/demo --nonsense", ROOT, check=False).stdout
    )


def test_the_image_the_bundle_and_the_command_have_one_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"bouquet {__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.mark.parametrize("words", ["hub sites", "hub status", "hub revoke garden", "hub admit garden key.pub"])
def test_the_hubs_commands_wait_for_neither_flower_nor_torch_nor_arrays(words, tmp_path):
    code = (
        f"import sys; from bouquet import cli; cli.main({words.split()!r}); print(*({{'flwr', 'httpx', 'numpy',"
        " 'torch', 'rich'} & sys.modules.keys()))"
    )
    env = os.environ | {"FLWR_HOME": str(tmp_path), "BOUQUET_ADAPTERS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENT
    )
    assert done.stdout.split() == [], done.stdout + done.stderr


@pytest.mark.parametrize("name", BEFORE)
def test_the_names_of_the_version_before_are_one_line_calls_of_the_command(name):
    [call] = [line for line in (ROOT / "scripts" / name).read_text().splitlines() if not line.startswith("#")]
    assert call == f'exec "$(dirname "${{BASH_SOURCE[0]}}")/bouquet" {BEFORE[name]} "$@"'
    assert (
        sh(f"scripts/{name} --help", ROOT, TERM="dumb", COLUMNS="100").stdout
        == sh(f"scripts/bouquet {BEFORE[name]} --help", ROOT, TERM="dumb", COLUMNS="100").stdout
    )


def test_the_command_is_that_of_the_folder_one_stands_in_else_of_its_environment(tmp_path: Path):
    """What docker/install writes beside the environment's python."""
    source = (ROOT / "docker/install").read_text()
    script = re.search(r"<<'SH'\n(.*?)^SH$", source, re.DOTALL | re.MULTILINE)[1]
    for name in ("one", "two"):
        bin = tmp_path / name / ".venv" / "bin"
        bin.mkdir(parents=True)
        (bin / "bouquet").write_text(script)
        (bin / "bouquet").chmod(0o755)
        (bin / "python").symlink_to(sys.executable)
        (tmp_path / name / "bouquet").mkdir()
        (tmp_path / name / "bouquet" / "__init__.py").touch()
        (tmp_path / name / "bouquet" / "__main__.py").write_text(f"import sys; print({name!r}, *sys.argv[1:])")
    for cwd, expected in (("one", "one hub sites\n"), ("two", "two hub sites\n"), (".", "one hub sites\n")):
        done = subprocess.run(
            [tmp_path / "one/.venv/bin/bouquet", "hub", "sites"], cwd=tmp_path / cwd, capture_output=True, text=True
        )
        assert done.stdout == expected, done.stderr


def test_the_index_names_every_command():
    page = (ROOT / "docs/README.md").read_text()
    rows = dict(re.findall(r"^\| (`bouquet \w+`.*?) \| (.*) \|$", page, re.MULTILINE))
    told = {word for names in rows for word in re.findall(r"`bouquet (\w+)`", names)}
    assert told == {words[0] for words in commands()}
    for group, *words in commands():
        assert (
            not words
            or all(
                f"`{word}`" in "".join(row for names, row in rows.items() if f"`bouquet {group}`" in names)
                for word in words
            )
            or group in ("measure", "worth")
        )
