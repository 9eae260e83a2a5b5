"""What the groups of commands share: arguments that mean the same in each, and how wrong use is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from app.errors import BouquetError
from bouquet import ROOT

WIDE = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
ANY = {"allow_extra_args": True, "ignore_unknown_options": True}
MODELS = ROOT / "models"

Name = Annotated[str, typer.Argument(metavar="NAME", help="a site's name: a-z, 0-9 and -")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]
Models = Annotated[Path, typer.Option(help="folder of base models", envvar="BOUQUET_MODELS", show_envvar=False)]
Json = Annotated[bool, typer.Option("--json", help="for programs")]


def group(about: str) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, help=about, context_settings=WIDE)


def wrong(what: str) -> typer.BadParameter:
    return typer.BadParameter(what)


def scripts(name: str) -> Path:
    """One of the programs that work before Python is there. Errors: HOST-18."""
    if not (file := ROOT / "scripts" / name).is_file():
        raise BouquetError("HOST-18", found=f"no {file}", fix=f"in a clone: scripts/{name}")
    return file


def instead(program: Path, *arguments: str) -> NoReturn:
    """Another program in this process's place."""
    sys.stdout.flush()
    os.execv(program, [str(program), *arguments])


def lines(given: list[str] | None, file: Path | None) -> list[str]:
    """Prompts, from the command line and from a file that has one a line."""
    try:
        told = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f"--prompts {file}: {error}") from None
    return [*(given or []), *(line.strip() for line in told if line.strip())]
