"""The settings of a checkout, as Compose reads them: the environment's, else .env's.

Enters: the folder of .env. Leaves: its settings. The one reader is scripts/_env.awk, which the shell's scripts use as
well.
Errors: HOST-14 (.env has a line that nobody can read), HOST-15 (a port that is none), CERT-05 (HUB_HOST has no host's
name).
"""

from __future__ import annotations

import ipaddress
import os
import re
import subprocess
from pathlib import Path

from app.errors import BouquetError
from bouquet import ROOT

READER = ROOT / "scripts" / "_env.awk"
ESCAPED = {"n": "\n", "r": "\r", "\\": "\\"}
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")


def read(folder: Path) -> dict[str, str]:
    """What .env sets, without the environment. Errors: HOST-14."""
    file = folder / ".env"
    if not file.exists():
        return {}
    if not file.is_file() or not os.access(file, os.R_OK):
        raise unreadable(f"{file} is no file that this user may read", "ls -ld .env; chown or chmod it")
    command = ["awk", "-v", "file=.env", "-v", "mode=all", "-f", str(READER)]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"LC_ALL": "C"}, capture_output=True)
    if done.returncode:
        raise unreadable(
            f"{file}, {done.stderr.decode(errors='replace').strip()}",
            "correct that line; docker compose stops at it, too",
        )
    lines = done.stdout.decode(errors="surrogateescape").split("\n")[:-1]
    settings = dict(line.split("=", 1) for line in lines)
    return {key: re.sub(r"\\(.)", lambda found: ESCAPED[found[1]], value) for key, value in settings.items()}


def unreadable(found: str, fix: str) -> BouquetError:
    return BouquetError("HOST-14", found=found, fix=fix)


def settings(folder: Path) -> dict[str, str]:
    """All that is set: the environment comes before .env, as it does for Compose."""
    return read(folder) | os.environ


def setting(folder: Path, key: str, default: str = "") -> str:
    """The environment's value, else .env's; where that is empty, the default."""
    return (os.environ[key] if key in os.environ else read(folder).get(key, "")) or default


def port(text: str, key: str) -> int:
    """Errors: HOST-15."""
    if re.fullmatch(r"[0-9]{1,5}", text) and 0 < int(text) < 65536:
        return int(text)
    raise BouquetError("HOST-15", found=f"{key}={text}", fix=f"{key} takes a port's number, 1 to 65535")


def path(folder: Path, text: str) -> Path:
    """A folder as a person writes it: ~ is the home, and what is relative is so to the checkout's folder."""
    return folder / (Path(text).expanduser() if text == "~" or text.startswith("~/") else text)


def hosts(text: str) -> list[str]:
    """Names and addresses, however they are divided; in brackets or not. Errors: CERT-05."""
    return [host(word) for word in re.split(r"[\s,;]+", text) if word]


def host(word: str, setting: str = "HUB_HOST") -> str:
    """A host's name or address without brackets. Errors: CERT-05."""
    bare = word[1:-1] if word.startswith("[") and word.endswith("]") else word
    try:
        if ":" in bare or re.fullmatch(r"[0-9.]+", bare):
            ipaddress.ip_address(bare)
            return bare
    except ValueError:
        pass
    else:
        if bare == word and NAME.fullmatch(word):
            return word
    fix = (
        'names or addresses only, with a space or a comma between, no https:// and no port: HUB_HOST="hub.example.org'
        ' 192.0.2.7"'
    )
    raise BouquetError("CERT-05", found=f"{setting} has {word}", fix=fix)
