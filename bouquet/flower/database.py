"""The SuperLink's database, made or brought to this version beside the old one, and put in its place in one step.

Flower makes its tables, and changes them for a new version, in the file itself. SQLite does not take back a CREATE
TABLE of a process that was killed, and what is half made never starts again ("table task already exists"). Here
Flower's own migrations work on a copy, FILE.new, and a rename ends it: whenever this is killed, the next start finds
the old file whole, or the new one. As it was before a change of version it stays as FILE.before-<revision>; of
several the last one.

Enters: the file's path. Leaves: a database of this version, in one file, which no other process has open while it is
exchanged. Errors: STATE-01 (half made, by a version that did not do this, and not empty), STATE-02 (of a newer
version), STATE-03 (neither read nor written: damaged, no room, no rights, in use).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory
from flwr.supercore.state.alembic import utils
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError

from app.errors import BouquetError
from app.files import sync
from bouquet.flower import seams

VERSION_TABLE = utils.ALEMBIC_VERSION_TABLE
BESIDE = ("", "-journal", "-wal", "-shm")  # a database of SQLite, and what it keeps beside it
PATIENCE = 30.0  # seconds that another reader of the file may take
OFTEN = 10.0  # seconds between two lines of a change that takes long
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a file holds. revision: by its own word, or ''; tables: whether it has any; rows: whether any has one."""

    revision: str
    tables: bool
    rows: bool


def say(line: str) -> None:
    print(f"bouquet: {line}", flush=True)


def prepare(file: Path, tell: Tell = say) -> None:
    """A database of this version at `file`, whatever is there now. Errors: STATE-01 to STATE-03."""
    with alone(file):
        new = file.with_name(f"{file.name}.new")
        remove(new)  # of a start that was cut off
        found = look(file)
        if found.revision == latest():
            return
        if not found.rows:
            half = "was half made and is empty; it is made anew"
            tell(f"the database {half if found.tables else 'is being made'}")
            migrate(new, tell)
            put(new, file)
            return
        known = [script.revision for script in scripts().walk_revisions()]
        if found.revision and found.revision not in known:
            raise newer(file, found.revision, known)
        before = file.with_name(f"{file.name}.before-{found.revision or 'alembic'}")
        tell(f"the database is brought from revision {found.revision or 'none'} to {latest()}; as it was: {before}")
        shutil.copyfile(file, new)
        try:
            migrate(new, tell)
        except SQLAlchemyError as error:
            raise half_made(file, found.revision, str(getattr(error, "orig", error))) from error
        keep(file, before)
        put(new, file)
        for older in set(backups(file)) - {before}:
            older.unlink()


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """While no other start works on this folder; what the system says of a file or of its disk is STATE-03."""
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if not all(os.access(path, os.W_OK) for path in (file.parent, file) if path.exists()):
                raise PermissionError(f"{file} may be read here and not written")
            yield
        finally:
            os.close(folder)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        found = f"{file}: {getattr(error, 'orig', None) or error}"
        copies = ", ".join(map(str, backups(file))) or "none here"
        fix = "end what else has it open, make room, give the folder to BOUQUET_USER; "
        fix += f"or restore a backup (docs/hub.md; kept: {copies})"
        raise BouquetError("STATE-03", found=found, fix=fix) from error
    finally:
        remove(file.with_name(f"{file.name}.new"), quietly=True)


def look(file: Path) -> Found:
    """What is in a file, which afterwards is one file and not in use by anybody else."""
    if not file.exists() or not file.stat().st_size:
        return Found("", False, False)
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        tables, revisions = {name for (name,) in names}, []
        if VERSION_TABLE in tables:
            revisions = database.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
        revision = ",".join(sorted(name for (name,) in revisions))
        if revision == latest():
            return Found(revision, True, True)
        rows = [database.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables - {VERSION_TABLE}]
        database.execute("PRAGMA journal_mode = DELETE")  # takes its log in; refused while another process has it open
        return Found(revision, bool(tables), any(rows))


def scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(config(create_engine("sqlite://")))


def config(engine: Engine) -> Config:
    """Flower's settings for Alembic, in a folder of any name: Flower's own are cut at a space, and end at a %."""
    made, folder = Config(), str(utils.ALEMBIC_DIR)
    options = {
        "path_separator": "newline",
        "script_location": folder,
        "version_locations": f"{folder}/versions",
        "sqlalchemy.url": engine.url.render_as_string(hide_password=False),
    }
    for name, value in options.items():
        made.set_main_option(name, value.replace("%", "%%"))
    return made


seams.begin(lambda: seams.take(seams.ALEMBIC_CONFIG, lambda _: config))


def latest() -> str:
    """The revision of this version of Flower."""
    return ",".join(sorted(scripts().get_heads()))


def migrate(file: Path, tell: Tell) -> None:
    """Flower's own migrations, with a line now and then: whoever waits for the hub sees that it lives."""
    log, steps = logging.getLogger("alembic.runtime.migration"), Steps(tell)
    level = log.level
    log.addHandler(steps)
    log.setLevel(logging.INFO)
    engine = create_engine(f"sqlite:///{file}")
    try:
        utils.run_migrations(engine)
    finally:
        engine.dispose()
        log.setLevel(level)
        log.removeHandler(steps)
    with file.open("rb") as written:
        os.fsync(written.fileno())


class Steps(logging.Handler):
    """Tells of a step of Alembic's when the last line is OFTEN seconds old."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell, self.count, self.last = tell, 0, time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "Running upgrade" in record.getMessage()
        if time.monotonic() - self.last > OFTEN:
            self.last = time.monotonic()
            self.tell(f"the database: step {self.count}")


def keep(file: Path, before: Path) -> None:
    """The file under a second name, too; a copy where the disk knows no hard links."""
    before.unlink(missing_ok=True)
    try:
        os.link(file, before)
    except OSError:
        half = before.with_name(f"{file.name}.new-before")
        shutil.copyfile(file, half)
        half.replace(before)


def put(new: Path, file: Path) -> None:
    """`new` in the place of `file`; a log that lies beside the old one would be read into the new."""
    remove(*[Path(f"{file}{end}") for end in BESIDE[1:]])
    new.replace(file)
    sync(file.parent)


def remove(*files: Path, quietly: bool = False) -> None:
    """Files with what SQLite keeps beside them."""
    for file in files:
        for end in BESIDE:
            try:
                Path(f"{file}{end}").unlink(missing_ok=True)
            except OSError:
                if not quietly:
                    raise


def backups(file: Path) -> list[Path]:
    """The databases before a change of version, the newest last."""
    return sorted(file.parent.glob(f"{file.name}.before-*"), key=lambda path: path.stat().st_mtime)


def newer(file: Path, revision: str, known: list[str]) -> BouquetError:
    ours = [path for path in backups(file) if path.name.partition(".before-")[2] in known]
    back = "or restore a backup (docs/hub.md)"
    if ours:
        back = f"or give up what happened since, and put {ours[-1]} in its place"
    found = f"{file} has revision {revision}, this version knows none after {latest()}"
    fix = f"start the version again that wrote it, {back}"
    return BouquetError("STATE-02", found=found, fix=fix)


def half_made(file: Path, revision: str, why: str) -> BouquetError:
    copies = ", ".join(map(str, backups(file))) or "none here"
    fix = f"restore a backup (docs/hub.md; kept: {copies}); "
    fix += "or move the file away: the hub starts empty, and `up` admits certs/admitted again"
    found = f"{file} at revision {revision or 'none'}: {why}; it is as it was"
    return BouquetError("STATE-01", found=found, fix=fix)
