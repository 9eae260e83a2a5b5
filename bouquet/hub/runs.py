"""What the hub's operator does with `flwr`: connect, start a run, ask how it is.

  python -m bouquet.hub.runs connect 127.0.0.1:8443     write the connection that `flwr run . remote-deployment` uses

Errors: HOST-08 (flwr's own words), HOST-16 (Flower's config.toml cannot be read or written).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from app import files, text
from app.errors import BouquetError
from bouquet import ROOT

BIN = Path(sys.executable).parent
CONNECTION = "remote-deployment"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def spared(env: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY with this host's own loopback, where there is a proxy: no proxy reaches the hub that listens there."""
    spare = env.get("no_proxy") or env.get("NO_PROXY") or ""
    if (
        not any(env.get(f"{kind}_proxy") or env.get(f"{kind.upper()}_PROXY") for kind in ("http", "https", "all"))
        or spare == "*"
    ):
        return {}
    missing = [host for host in LOOPBACK if host not in re.split(r"[\s,]+", spare)]
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*filter(None, [spare]), *missing]))


os.environ.update(spared(os.environ))  # for flwr's client and urllib in this process, and for all that it starts


def flwr(*args: str) -> dict[str, Any]:
    """One `flwr` command as JSON. Raises HOST-08 with flwr's own words when it fails."""
    done = subprocess.run(
        [BIN / "flwr", *args, "--format", "json"], cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"success": False, "error-message": done.stdout + done.stderr}
    if not answer.get("success"):
        found = " ".join(str(answer.get("error-message", answer)).split())
        fix = "is the deployment up? docker compose ps, or scripts/demo"
        raise BouquetError("HOST-08", did=f"refused flwr {args[0]}", found=found, fix=fix)
    return answer


def start_run(run_config: str = "") -> str:
    """As `flwr run . remote-deployment`, after a check of the run config that names a wrong key; the run's id. Errors:
    CONFIG, HOST-08.
    """
    from flwr.common.config import flatten_dict, get_project_config, parse_config_args

    from app import bundle
    from app.config import RunConfig
    from bouquet.hub import control

    changes = parse_config_args([run_config] if run_config else None)
    defaults = flatten_dict(get_project_config(ROOT)["tool"]["flwr"]["app"].get("config", {}))
    RunConfig.read(defaults | changes)
    return control.start_run(bundle.build(ROOT), changes)


def status(run_id: str) -> tuple[str, str]:
    """(state, details) of a run; state is pending, starting, running or finished:completed|failed|stopped. Errors:
    HOST-08.
    """
    from bouquet.hub import control

    if (run := control.run(run_id)) is None:
        raise BouquetError(
            "HOST-08", did="knows no such run", found=run_id, fix="flwr ls remote-deployment lists those it knows"
        )
    return run.state, run.details


def nodes_online() -> int:
    """SuperNodes that the hub hears. Errors: HOST-08."""
    from bouquet.hub import control

    return sum(node.status == "online" for node in control.nodes())


def connect(address: str, ca: Path, say: Callable[[str], None] = print) -> None:
    """Write [superlink.remote-deployment] to Flower's config.toml; everything else in the file stays as it is.

    An entry of that name that is not of these certificates is another project's: what the file was is kept beside it.
    Errors: HOST-16.
    """
    import tomli_w
    from flwr.cli.flower_config import init_flwr_config
    from flwr.supercore.utils import get_flwr_home

    file = get_flwr_home() / "config.toml"
    entry = {"address": address, "root-certificates": str(ca)}
    try:
        init_flwr_config()
        before = file.read_text(encoding="utf-8-sig")
        known = tomllib.loads(before)
        links = known.get("superlink", {})
        if not isinstance(links, dict):
            raise ValueError("superlink is no table")
        if (old := links.get(CONNECTION)) == entry:
            return
        wanted = known | {"superlink": links | {CONNECTION: entry}}
        after = with_entry(before, wanted)
        if old is not None and not (isinstance(old, dict) and old.get("root-certificates") == str(ca)):
            where = text.line(old.get("address", "nowhere") if isinstance(old, dict) else old)
            say(
                f"connection: {CONNECTION} was another project's, to {where}; what {file} was is now"
                f" {kept(file, before)}"
            )
        elif "#" in before and after == tomli_w.dumps(wanted):
            say(f"connection: {file} is written anew, without its comments; what it was is now {kept(file, before)}")
        files.write(file, after, file.stat().st_mode & 0o777)
    except (OSError, ValueError) as error:  # ValueError: no TOML, no UTF-8
        fix = "mend that file or move it away (Flower makes a new one), then again"
        raise BouquetError("HOST-16", found=f"{file}: {error}", fix=fix) from None


def with_entry(before: str, wanted: dict[str, Any]) -> str:
    """The file's text with the entry, comments and all; where it is spelled in another way than a table of its own,
    written anew.
    """
    import tomli_w

    head = re.compile(rf"""\s*\[\s*["']?superlink["']?\s*\.\s*["']?{CONNECTION}["']?\s*\]\s*(#.*)?""")
    lines = before.split("\n")
    for first in (number for number, line in enumerate(lines) if head.fullmatch(line)):
        end = next(
            (number for number in range(first + 1, len(lines)) if lines[number].lstrip().startswith("[")), len(lines)
        )
        # a comment before the next table is that one's
        while end > first + 1 and not lines[end - 1].split("#")[0].strip():
            end -= 1
        del lines[first:end]
        break
    rest = "\n".join(lines).rstrip()
    section = tomli_w.dumps({"superlink": {CONNECTION: wanted["superlink"][CONNECTION]}})
    after = f"{rest}\n\n{section}".lstrip()
    try:
        if tomllib.loads(after) == wanted:
            return after
    except tomllib.TOMLDecodeError:
        pass
    return tomli_w.dumps(wanted)


def kept(file: Path, content: str) -> Path:
    """A copy of the file under a number; one that is the same is there already."""
    for number in range(1, 1000):
        copy = file.with_name(f"{file.name}.{number}")
        if not copy.exists():
            copy.write_text(content, encoding="utf-8")
        if copy.read_text(encoding="utf-8") == content:
            return copy
    raise OSError("there are a thousand copies of it")


if __name__ == "__main__":
    if sys.argv[1:2] != ["connect"] or len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        connect(sys.argv[2], ROOT / "certs" / "ca.crt")
    except BouquetError as error:
        sys.exit(error.report())
