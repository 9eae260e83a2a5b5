""".env as people write it: every reader here reads what Compose reads, and what is written is read back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import sh

from app.errors import BouquetError
from bouquet import ROOT, demo, dotenv

HOME = "/srv/me"
REFUSED = object()
TABLE = [  # a file, and the value of V in it by Docker Compose 2.26; None: V is not set
    ("V=a b", "a b"),
    ('V="a b"', "a b"),
    ("V='a b'", "a b"),
    ("V=a # c", "a"),
    ("V=a#c", "a#c"),
    ('V="a" # c', "a"),
    ("V=a\r\n", "a"),
    ("export V=a", "a"),
    ("  export  V = a", "a"),
    ("V: a", "a"),
    ("V=$HOME/x", "/srv/me/x"),
    ("A=1\nV=${A}", "1"),
    ("A=1\nV='${A}'", "${A}"),
    ("V=1\nV=2", "2"),
    ("\ufeffV=a", "a"),
    ("V=~/x", "~/x"),
    ('V="a\nb"', "a\nb"),
    ("#V=1", None),
    ("V=cost $5", "cost $5"),
    ('V="a"\r\nB="b"\r\n', "a"),
    ("V='a\\'", REFUSED),
    ("V='a\\b'", "a\\b"),
    ("V='a\\\\b'", "a\\\\b"),
    ("V='a\\\\'", "a\\\\"),
    ("V='l\\'eau'", "l'eau"),
    ('V="q\\"q"', 'q"q'),
    ('V="a\\\\b"', "a\\b"),
    ('V="a\\\\"', "a\\"),
    ('V="a\\nb"', "a\nb"),
    ('V="a\\\\nb"', "a\\nb"),
    ('V="a\\$b"', "a$b"),
    ('V="a$$b"', "a$b"),
    ("V=a$$b", "a$b"),
    ("V=a\\$b", "a\\"),
    ("V='a$b'", "a$b"),
    ('V="a\\x41\\041\\101"', "a\\x41\\41\\101"),
    ("V=a\\nb", "a\\nb"),
    ("V=a\tb\t# c", "a\tb\t# c"),
    ("V=a\t#c", "a\t#c"),
    ("V=a  #c", "a"),
    ('V="a" b # c\nB=1', REFUSED),
    ("V='a' 'b'", REFUSED),
    ("V='a'\"b\"", REFUSED),
    ("1V=x\nV=$1V", "$1V"),
    ("V.W=x\nV=ok", "ok"),
    ("V-W=1\nV=ok", "ok"),
    ("V[1]=1\nV=ok", "ok"),
    ("V@=1\nV=ok", REFUSED),
    ("V=a${}b", REFUSED),
    ("V=$", "$"),
    ("V=${", REFUSED),
    ("V=$(id)", "$(id)"),
    ("V=${N:-a}b", "ab"),
    ('V=${N:-"q"}', '"q"'),
    ("V=${N:-a b} # c", "a b"),
    ("V=${N:-a # b}", REFUSED),
    ("export V", None),
    ("V", None),
    ("V=", ""),
    ('V=""', ""),
    ("V=''", ""),
    ('V= ""', ""),
    ('V="\n', REFUSED),
    ("V='\n", REFUSED),
    ("=x", REFUSED),
    (" =x\nV=1", REFUSED),
    ('"V"=1', REFUSED),
    ("V='a\r\nb'\r\n", "a\r\nb"),
    ("V=a\rb", "a\rb"),
    ("V=x\n#\n#B=1\nexport\tB=1", "x"),
    ("V=x\n\texport B=$V\nV=$B$B", "xx"),
    ('V="x"# c', "x"),
    ("V='x'#c", "x"),
    ('V="${N:?no}"', REFUSED),
    ("V=${HOME:?}", "/srv/me"),
    ("V=${N?}", REFUSED),
    ("V=${N:+y}", ""),
    ("V=${N+y}", ""),
    ("V=${HOME-y}", "/srv/me"),
    ("V=${N-${M-z}}", "z"),
    ('V="${N-}}"', "}"),
    ("V=$HOME$HOME", "/srv/me/srv/me"),
    ("V=$NOPE-x", "-x"),
    ('V="a\\', REFUSED),
    ("V='\\''", "'"),
    ('V="$(date)"', "$(date)"),
    ("V=a=b=c", "a=b=c"),
    ("V = = x", "= x"),
    ("V:=x", "=x"),
    ("V =: x", ": x"),
    ("foo", None),
    ("foo=bar\nfoo bar=1", REFUSED),
    ("export foo bar=1", REFUSED),
    ("V=`x`", "`x`"),
    ("V=x'y", "x'y"),
    ('V="x\'y"', "x'y"),
    ("V='x\"y'", 'x"y'),
    ("V=\u00a0x", "x"),
    ("V=x\u00a0", "x"),
    ("V=${A-b}}", "b}"),
    ('V=1\n  # c\n\n\nB="', REFUSED),
    ("# it's\nV=1", "1"),
    ('V="a#b" #c "d"', "a#b"),
    ("V=#x", "#x"),
    ("V= #x", "#x"),
    ("V=  # x y", "# x y"),
    ("V=${N:-~}", "~"),
    ("V\n=1", REFUSED),
    ("V=\n1", ""),
    ('V=\n"x"', REFUSED),
    ("V= \n B=1", ""),
    ("V='a'  \n  B=1", "a"),
    ("V=a;b", "a;b"),
    ("ü=1\nV=2", "2"),
    ("V=${ü}", REFUSED),
    ('V="$"', "$"),
    ("V=x$", "x$"),
    ('V="$ x"', "$ x"),
    ("V=$-x", "$-x"),
    ('V="\\t\\v\\a|"', "\t\u000b\u0007|"),
    ('V="\\0"', "\\"),
    ('V="\\e"', "\\e"),
    ("V=${N:-}", ""),
    ("V=${HOME%/x}", REFUSED),
    ('V="a\\\nb"', "a\\\nb"),
    ("V=a \\\nb=1", "a \\"),
    ('V="é$é"', "é$é"),
]
VALUES = [
    "a",
    "it's",
    "a\\b",
    'a"b',
    "cost $5 # x",
    "two\nlines",
    "all ' \" \\ $x ${y}",
    "end\\",
    " lead",
    "tail ",
    "",
    "Ünï — 花",
    "~/x",
    "$(id)",
    "`id`",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each row of the table, with its .env and what the scripts need to read it."""
    made = []
    for number, (text, _) in enumerate(TABLE):
        folder = tmp_path_factory.mktemp("row") if number == 0 else made[0].parent / f"row-{number:03d}"
        folder.mkdir(exist_ok=True)
        (folder / "scripts").symlink_to(ROOT / "scripts")
        (folder / ".env").write_bytes((text if text.endswith("\n") else text + "\n").encode())
        made.append(folder)
    return made


def expected() -> list[str | None]:
    return [None if value is REFUSED else value for _, value in TABLE]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)
    for name in ("V", "A", "B", "N", "M", "NOPE"):
        monkeypatch.delenv(name, raising=False)


def test_python_reads_what_compose_reads(folders: list[Path]) -> None:
    def value(folder: Path) -> str | None:
        try:
            return dotenv.read(folder).get("V")
        except BouquetError as error:
            assert error.code == "HOST-14" and f"{folder / '.env'}, line " in error.found
            return None

    assert [value(folder) for folder in folders] == expected()


def test_the_scripts_read_what_compose_reads(folders: list[Path]) -> None:
    ask = '. scripts/_lib.sh && [ -n "${DOTENV[V]+set}" ] && printf "set%s" "${DOTENV[V]}"'
    each = f'for folder; do (cd "$folder" && {ask}) 2>/dev/null; printf "\\0"; done'
    shown = (
        subprocess.run(["bash", "-c", each, "each", *folders], capture_output=True, check=True)
        .stdout.decode()
        .split("\0")[:-1]
    )
    assert [value[3:] if value else None for value in shown] == expected()


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker command")
def test_the_table_is_composes_own(folders: list[Path]) -> None:
    """A dozen rows of it, as each costs a process: the ones that people write."""
    for folder, value in list(zip(folders, expected(), strict=True))[:14]:
        (folder / "compose.yaml").write_text('services: { a: { image: x, labels: { v: "${V}" } } }\n')
        done = sh("docker compose config --format json 2>/dev/null", folder)
        assert json.loads(done.stdout)["services"]["a"]["labels"]["v"].replace("$$", "$") == (value or ""), folder


def test_the_environment_comes_before_the_file_and_an_empty_value_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / ".env").write_text("HUB_PORT=8500\nHUB_HOST=\n")
    ask = ". scripts/_lib.sh; setting HUB_PORT 8443; setting HUB_HOST none"
    monkeypatch.delenv("HUB_PORT", raising=False)
    monkeypatch.delenv("HUB_HOST", raising=False)
    for env, port in (({}, "8500"), ({"HUB_PORT": "8600"}, "8600"), ({"HUB_PORT": ""}, "8443")):
        with monkeypatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            assert sh(ask, tmp_path).stdout.split() == [port, "none"]
            assert [dotenv.setting(tmp_path, "HUB_PORT", "8443"), dotenv.setting(tmp_path, "HUB_HOST", "none")] == [
                port,
                "none",
            ]


@pytest.mark.parametrize("value", VALUES)
def test_what_the_scripts_and_the_kit_write_is_read_back(tmp_path: Path, value: str) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / ".env").write_text("export V=old\nW=1")  # spelled otherwise, and a last line that was not ended
    subprocess.run(
        ["bash", "-euc", '. scripts/_lib.sh; keep V never; put V "$1"; keep X 2', "put", value],
        cwd=tmp_path,
        check=True,
    )
    assert dotenv.read(tmp_path) == {"V": value, "W": "1", "X": "2"}
    kit = (ROOT / "scripts/site").read_text()
    functions = "set -eu\n" + "".join(part for part in kit.split("\n\n") if part.startswith(("put()", "quoted()")))
    subprocess.run(
        ["sh", "-c", functions.replace("quoted()", "\nquoted()") + '\nput V "$1"', "put", value],
        cwd=tmp_path,
        check=True,
    )
    assert dotenv.read(tmp_path)["V"] == value


def test_a_line_that_nobody_can_read_is_named_by_every_script(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".env").write_text("HUB_PORT=8443\nHUB_HOST='hub.example.org\n")
    for script in ("certs", "setup", "add-site 3 --data .", "demo"):
        told = sh(f"scripts/{script}", tmp_path, check=False)
        assert told.returncode == 1 and told.stdout.startswith(
            "HOST-14  .env cannot be read.\n  found  .env, line 2: a quotation mark is not closed\n"
        ), told.stdout
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()  # what Docker makes of a file that it was to mount and that is not there
    assert sh("scripts/certs", tmp_path, check=False).stdout.startswith("HOST-14")
    with pytest.raises(BouquetError, match="HOST-14"):
        dotenv.read(tmp_path)


# --- hosts and ports
# -----------------------------------------------------------------------------------------------------

HOSTS = {
    "hub.example.org": ["hub.example.org"],
    " hub.example.org  192.0.2.7 ": ["hub.example.org", "192.0.2.7"],
    "hub.example.org,192.0.2.7": ["hub.example.org", "192.0.2.7"],
    "hub.example.org, 192.0.2.7; hub_2": ["hub.example.org", "192.0.2.7", "hub_2"],
    "[2001:db8::7]": ["2001:db8::7"],
    "2001:db8::7 ::1": ["2001:db8::7", "::1"],
    "": [],
}
NO_HOSTS = [
    "https://hub.example.org",
    "hub.example.org:8443",
    "[2001:db8::7]:8443",
    "300.1.2.3",
    "1.2.3",
    "hub..org",
    "-hub",
    "hub.örg",
    "*",
    "user@hub",
    "2001:db8:7",
    "[hub]",
    "hub/x",
    "10.0.0.0/8",
]


def ask_hosts(text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", '. scripts/_lib.sh; hosts "$1"', "hosts", text], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("text", HOSTS)
def test_hosts_are_divided_and_trimmed_alike_in_both_languages(text: str) -> None:
    assert ask_hosts(text, ROOT).stdout.split() == dotenv.hosts(text) == HOSTS[text]


@pytest.mark.parametrize("word", NO_HOSTS)
def test_what_is_no_host_is_named_in_both_languages(word: str) -> None:
    told = ask_hosts(f"hub.example.org {word}", ROOT)
    assert (
        told.returncode == 1
        and told.stderr.startswith("CERT-05  That is no name of the hub.\n")
        and "HUB_HOST has " in told.stderr
    )
    with pytest.raises(BouquetError, match="CERT-05"):
        dotenv.hosts(f"hub.example.org {word}")


@pytest.mark.parametrize("port", ["", "0", "65536", "eight", "8443 8444", "-1", "8443/tcp", "٤"])
def test_a_port_that_is_none_is_named(tmp_path: Path, port: str) -> None:
    with pytest.raises(BouquetError, match="HOST-15"):
        dotenv.port(port, "HUB_PORT")
    assert sh(f'. scripts/_lib.sh; is_port "{port}"', ROOT, check=False).returncode == 1
    assert dotenv.port("8443", "HUB_PORT") == 8443


# --- the demo among processes
# ----------------------------------------------------------------------------------------------


def test_the_demo_takes_folders_as_people_write_them_and_gives_each_site_its_own_switches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        'export HUB_PORT="8500" # public', "SITE_1_DATA=~/photos", "SITE_2_DATA = '/srv/my photos'",
        "# SITE_3_DATA=/old", "SITE_1_LIMITS='max-local-steps=200 min-batch-size=8'", "SITE_2_TRUST_DAYS=90",
        "SITE_2_CHECKPOINTING=1", "SITE_2_CONSENT=ask", "SITE_2_GPU=none", "SITE_KEEP=0",
        "SITE_2_PRIVACY='epsilon=8 clip=0.05'",
    ]  # fmt: skip
    (tmp_path / ".env").write_text("\r\n".join(lines) + "\r\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    for key in [key for key in os.environ if key.startswith(("SITE_", "HUB_"))]:
        monkeypatch.delenv(key)
    running = demo.engine("process")
    assert running.port == 8500
    assert running.sites == {"site-1": Path(HOME) / "photos", "site-2": Path("/srv/my photos")}
    assert running.pins["site-1"] == {"SITE_LIMITS": "max-local-steps=200 min-batch-size=8"}
    own = {"SITE_TRUST_DAYS": "90", "SITE_CHECKPOINTING": "1", "SITE_GPU": "none", "SITE_CONSENT": "ask"}
    own["SITE_PRIVACY"] = "epsilon=8 clip=0.05"
    assert {key: running.pins["site-2"][key] for key in own} == own
    assert running.site_env["SITE_KEEP"] == "0" and "SITE_KEEP" not in running.env


def test_a_mistake_in_the_settings_is_the_demos_last_word_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["demo", "process"])
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.delenv("HUB_PORT", raising=False)
    (tmp_path / ".env").write_text("HUB_PORT=https\n")
    assert demo.main() == 1
    assert capsys.readouterr().err.startswith("HOST-15  A setting cannot be used.\n  found  HUB_PORT=https\n")


# --- numbers
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comma(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a host whose numbers have a comma."""
    folder = tmp_path_factory.mktemp("locale")
    made = (
        subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.UTF-8"], capture_output=True)
        if shutil.which("localedef")
        else None
    )
    if not (folder / "de_DE.UTF-8").is_dir():
        pytest.skip(f"no locale with a comma can be made here: {made.stderr.decode() if made else 'no localedef'}")
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.UTF-8"}


def test_a_steps_seconds_are_written_with_a_point_where_the_hosts_numbers_have_a_comma(
    tmp_path: Path, comma: dict[str, str]
) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    assert "," in sh('printf "%.1f" 1,5', tmp_path, **comma).stdout  # so this host's bash has it
    sh(
        "set -euo pipefail; . scripts/_lib.sh; step packages true",
        tmp_path,
        BOUQUET_TIMES=str(tmp_path / "times"),
        **comma,
    )
    name, seconds = (tmp_path / "times").read_text().split()
    assert name == "packages" and 0 <= float(seconds) < 60


def test_a_step_that_took_76_543_seconds_is_noted_with_one_digit_and_told(tmp_path: Path) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    clock = "unset EPOCHREALTIME; EPOCHREALTIME=1700000000,000000; later() { EPOCHREALTIME=1700000076,543210; }; "
    shown = sh(
        f"set -euo pipefail; . scripts/_lib.sh; {clock} step packages later",
        tmp_path,
        BOUQUET_TIMES=str(tmp_path / "times"),
    ).stdout
    assert (tmp_path / "times").read_text() == "packages\t76.5\n" and shown.splitlines()[-1].endswith(
        "packages took 77 s"
    )
