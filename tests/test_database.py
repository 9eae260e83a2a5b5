"""The SuperLink's database at a first start and at a change of version, whole or cut off: the hub starts again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import pytest
from alembic import command
from flwr.supercore.state.alembic import utils
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError

from app.errors import BouquetError
from benchmarks import hostile
from benchmarks.faults.bench import certificates
from bouquet import ROOT
from bouquet.flower import database
from bouquet.hub.deployment import Processes, free_port
from tests.kit.wait import PATIENT

OLD = "6e5225b231fc"  # one step before this Flower's newest revision
OLDEST = "26b5d6018750"  # many steps before it


@cache
def empty(revision: str) -> bytes:
    """A database of that revision by Flower's own migrations."""
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{folder}/x.db")
        command.upgrade(utils.build_alembic_config(engine), revision)
        engine.dispose()
        return Path(folder, "x.db").read_bytes()


def made(file: Path, revision: str = "heads", rows: int = 0) -> Path:
    """A database of that revision, with some rows."""
    file.write_bytes(empty(revision))
    with closing(sqlite3.connect(file)) as db, db:
        db.executemany("INSERT INTO nonce_store VALUES ('n', ?, 1e12)", [(str(row),) for row in range(rows)])
    return file


def held(file: Path) -> tuple[str, int]:
    """(revision, rows) of a database that is whole."""
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        [revision] = db.execute("SELECT version_num FROM alembic_version").fetchone()
        return revision, db.execute("SELECT count(*) FROM nonce_store").fetchone()[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(file: Path) -> BouquetError:
    """What is said of a file, which stays as it is."""
    before = file.read_bytes()
    with pytest.raises(BouquetError) as caught:
        database.prepare(file)
    assert file.read_bytes() == before and not list(file.parent.glob("*.new*"))
    return caught.value


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "superlink.db"


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["nothing", "an empty file", "what a start that was cut off left"])
def test_a_first_start_makes_the_database_of_this_version(file, there):
    if there != "nothing":
        (file if there == "an empty file" else file.with_name("superlink.db.new")).write_bytes(b"")
    if "cut off" in there:
        made(file.with_name("superlink.db.new"), OLDEST)
        file.with_name("superlink.db-wal").write_bytes(b"of a file that somebody took away")
    database.prepare(file)
    assert held(file) == (database.latest(), 0) and names(file.parent) == ["superlink.db"]


def test_a_database_of_this_version_is_left_alone_whoever_has_it_open(file):
    before = made(file, rows=3).read_bytes(), file.stat().st_ino
    with closing(sqlite3.connect(file)) as other:
        other.execute("SELECT count(*) FROM nonce_store").fetchone()
        database.prepare(file)
    assert (file.read_bytes(), file.stat().st_ino) == before and names(file.parent) == ["superlink.db"]


@pytest.mark.parametrize("revision", [OLD, OLDEST])
def test_an_older_version_is_brought_up_with_all_that_it_held_and_kept_as_it_was(file, revision):
    made(file, revision, rows=7)
    made(file.with_name("superlink.db.before-8e65d8ae60b0"), OLDEST)
    database.prepare(file)
    assert held(file) == (database.latest(), 7)
    assert names(file.parent) == ["superlink.db", f"superlink.db.before-{revision}"]  # of several the last one
    assert held(file.with_name(f"superlink.db.before-{revision}")) == (revision, 7)


def test_what_a_killed_superlink_left_in_its_log_is_taken_along_and_never_read_twice(tmp_path, file):
    crashed = made(tmp_path / "crashed", OLD)
    with closing(sqlite3.connect(crashed)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        with db:
            db.execute("INSERT INTO nonce_store VALUES ('n', 'in the log alone', 1e12)")
        for end in ("", "-wal", "-shm"):  # as they lie there when the process is killed
            Path(f"{file}{end}").write_bytes(Path(f"{crashed}{end}").read_bytes())
    database.prepare(file)
    assert held(file) == (database.latest(), 1)
    assert not list(file.parent.glob("superlink.db-*"))


# --- half made -------------------------------------------------------------------------------------------------------


def half(file: Path, rows: int = 0) -> Path:
    """What a kill leaves of tables that are made in place: they are there, and Alembic has not noted it."""
    made(file, OLDEST, rows)
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'b277e6f3656c'")  # the revision before
    return file


def test_flower_itself_never_gets_over_a_half_made_database(file):
    with pytest.raises(OperationalError, match="already exists|duplicate column|no such"):
        utils.run_migrations(create_engine(f"sqlite:///{half(file)}"))


def test_a_half_made_database_that_holds_nothing_is_made_anew(file):
    database.prepare(half(file))
    assert held(file) == (database.latest(), 0) and names(file.parent) == ["superlink.db"]


def test_a_half_made_database_that_holds_something_is_named_and_stays(file):
    made(file.with_name("superlink.db.before-33e2f70642b1"), OLDEST)
    error = refused(half(file, rows=1))
    assert error.code == "STATE-01" and "b277e6f3656c" in error.found
    assert "superlink.db.before-33e2f70642b1" in error.fix


# --- what cannot be used ---------------------------------------------------------------------------------------------


def of_the_future(file: Path) -> Path:
    made(file, rows=2)
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    return file


def test_a_database_of_a_newer_version_is_named(file):
    error = refused(of_the_future(file))
    assert error.code == "STATE-02" and "ffffffffffff" in error.found and "docs/hub.md" in error.fix


def test_going_back_a_version_is_told_of_the_copy_that_fits(file):
    made(file.with_name(f"superlink.db.before-{OLD}"), OLD)
    error = refused(of_the_future(file))
    assert error.code == "STATE-02" and f"superlink.db.before-{OLD} in its place" in error.fix


def test_a_damaged_file_is_named(file):
    file.write_bytes(b"no database at all " * 400)
    assert refused(file).code == "STATE-03"


def test_a_database_that_another_hub_has_open_is_not_exchanged_under_it(file, monkeypatch):
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    with closing(sqlite3.connect(made(file, OLD, rows=1))) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("SELECT * FROM nonce_store").fetchone()
        error = refused(file)
    assert error.code == "STATE-03" and "locked" in error.found


def test_no_folder_is_named(tmp_path):
    with pytest.raises(BouquetError) as caught:
        database.prepare(tmp_path / "missing" / "superlink.db")
    assert caught.value.code == "STATE-03" and "missing" in caught.value.found


PRELUDE = f"""
import json, os, resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from app.errors import BouquetError
from bouquet.flower import database
"""


def alone(code: str, *arguments: object) -> list:
    """What a Python of its own says, a line of JSON each."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if not line.startswith("bouquet: ")]


@pytest.mark.parametrize("rows", [0, 5])
def test_a_full_disk_is_named_and_nothing_is_lost_by_it(file, rows):
    if rows:
        made(file, OLD, rows)
    [code] = alone(
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    database.prepare(Path(sys.argv[1]))
except BouquetError as error:
    print(json.dumps(error.code))
""",
        file,
    )
    assert code == "STATE-03"
    assert names(file.parent) == (["superlink.db"] if rows else [])
    database.prepare(file)
    assert held(file) == (database.latest(), rows)


@pytest.mark.parametrize("name", ["with space", "100%", "ümlaut, comma"])
def test_the_hub_may_lie_in_a_folder_of_any_name(tmp_path, name, monkeypatch):
    folder = Path(shutil.copytree(utils.ALEMBIC_DIR, tmp_path / name / "alembic"))
    monkeypatch.setattr(utils, "ALEMBIC_DIR", folder)
    database.prepare(folder.parent / "superlink.db")
    assert held(folder.parent / "superlink.db") == (database.latest(), 0)


# --- kills -----------------------------------------------------------------------------------------------------------

KILLED = """
import logging, shutil
def doing(event, path):  # whatever is done to a file of that folder may be the last thing, and each step of the change
    global left
    left -= path.startswith(str(work))
    if left < 0:
        os._exit(9)
class Step(logging.Handler):
    def emit(self, record):
        doing("step", str(work))
def watch():
    files = (str, os.PathLike)
    sys.addaudithook(lambda event, args: args and isinstance(args[0], files) and doing(event, os.fspath(args[0])))
    logging.getLogger("alembic.runtime.migration").addHandler(Step())
start, work = Path(sys.argv[1]), Path(sys.argv[2])
for last in range(0, 400, int(sys.argv[3])):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work)
    sys.stdout.flush()
    if not (child := os.fork()):
        left = last
        watch()
        database.prepare(work / "superlink.db")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    database.prepare(work / "superlink.db")
    from test_database import held, names
    print(json.dumps([code, *held(work / "superlink.db"), names(work)]))
    if code == 0:
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize(("revision", "every"), [("", 15), (OLD, 2)])
def test_a_kill_at_any_moment_leaves_what_the_next_start_needs(tmp_path, revision, every):
    (tmp_path / "start").mkdir()
    rows = 4 if revision else 0
    if revision:
        made(tmp_path / "start" / "superlink.db", revision, rows)
    states = alone(KILLED, tmp_path / "start", tmp_path / "work", every)
    kept = [f"superlink.db.before-{revision}"] * bool(revision)
    assert [code for code, *_ in states] == [9] * (len(states) - 1) + [0] and len(states) > 5
    assert {tuple(state[1:3]) for state in states} == {(database.latest(), rows)}
    assert all(state[3] == ["superlink.db", *kept] for state in states)


# --- a real SuperLink ------------------------------------------------------------------------------------------------


class Hub(Processes):
    """A SuperLink that is ended at a moment of its first start."""

    def begin(self) -> None:
        for folder in (self.home / "state", self.home / "flwr", self.adapters, self.logs, self.signatures):
            folder.mkdir(parents=True, exist_ok=True)
        self._spawn("superlink", self.superlink())

    def killed_when(self, moment) -> None:
        self.begin()
        while not moment():
            assert self.running["superlink"].poll() is None, (self.logs / "superlink.log").read_text()[-2000:]
        os.kill(self.running["superlink"].pid, signal.SIGKILL)
        self.running.pop("superlink").wait()


@contextmanager
def hub(home: Path):
    running = Hub(home, certificates(home), free_port(), {})
    try:
        yield running
    finally:
        running.stop()


def tables(file: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=0.01)) as db:
            return db.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
def test_a_superlink_that_is_killed_again_and_again_in_its_first_start_starts(tmp_path):
    state = tmp_path / "state"
    with hub(tmp_path) as running:
        running.killed_when(lambda: (state / "superlink.db.new").exists())
        running.killed_when(lambda: tables(state / "superlink.db.new") > 5 or (state / "superlink.db").exists())
        running.killed_when(lambda: (state / "superlink.db").exists())
        running.begin()
        running._wait_for_superlink()
        door = hostile.Door("127.0.0.1", running.port, running.certs / "ca.crt")
        assert door.send("GET", "/health").status == 200
        assert database.look(state / "superlink.db").revision == database.latest()


def test_a_superlink_says_why_it_cannot_use_its_database_and_ends(tmp_path):
    of_the_future((tmp_path / "state").mkdir() or tmp_path / "state" / "superlink.db")
    with hub(tmp_path) as running:
        running.begin()
        assert running.running["superlink"].wait(120) == 1
        assert "STATE-02" in (running.logs / "superlink.log").read_text()
