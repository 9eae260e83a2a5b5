"""The deployment on this host, as containers or as processes: the same SuperLink, TLS, keys, SuperNodes and app.

Enters: certificates, site keys and data that scripts/setup made. Leaves: a SuperLink, a ServerApp executor and one
SuperNode a site, all online; or HOST-05 (Compose failed), HOST-06 (no hub), HOST-07 (a site did not join).
Both engines have start(), stop() and fetch(run), which says where a run's folder is on this host.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from pathspec import GitIgnoreSpec

from app import text
from app.errors import BouquetError
from bouquet import ROOT
from bouquet.hub.runs import BIN, QUIET, nodes_online

TELL = 15.0  # seconds between two lines about a hub that still starts


class Compose:
    """The deployment as containers; `.env` says which Compose files, image, devices and folders."""

    def __init__(self) -> None:
        self.logs = "docker compose logs"
        self.ours = not self._compose("ps", "--status", "running", "-q", capture=True)

    def start(self) -> None:
        self._compose("up", "-d", "--wait", "--quiet-pull")

    def stop(self) -> None:
        """Stop what start() started; containers, networks and volumes stay."""
        if self.ours:
            self._compose("stop", "--timeout", "20")

    def fetch(self, run_id: str) -> Path:
        """Copy a run's folder out of the adapters volume; where it is on this host."""
        adapters = ROOT / ".bouquet" / "adapters"
        adapters.mkdir(parents=True, exist_ok=True)
        self._compose("cp", f"serverapp:/adapters/{run_id}", str(adapters))
        link = adapters / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(run_id)
        link.rename(adapters / "latest")
        return adapters / run_id

    def _compose(self, *args: str, capture: bool = False) -> str:
        done = subprocess.run(
            ["docker", "compose", "--progress", "quiet", *args],
            cwd=ROOT,
            stdout=subprocess.PIPE if capture else None,
            text=True,
        )
        if done.returncode:
            fix = "docker compose ps -a, docker compose logs"
            raise BouquetError("HOST-05", found=f"docker compose {' '.join(args)}", fix=fix)
        return done.stdout or ""


class Processes:
    """The deployment as processes on loopback, for hosts without Docker. All state lies under `home`."""

    def __init__(
        self,
        home: Path,
        certs: Path,
        port: int,
        sites: Mapping[str, Path],
        env: Mapping[str, str] = {},
        trusted: Path | None = None,
        models: Path = ROOT / "models",
        gpus: Mapping[str, str] = {},
    ) -> None:
        """sites: name -> data folder; env: additions to every process's environment; trusted: the publishers that the
        sites pin. gpus: site -> the one GPU that it sees, by nvidia-smi's index or UUID, or none; a site that is not
        in it sees them all.
        """
        self.models = models
        self.home, self.certs, self.port, self.sites, self.trusted = home, certs, port, dict(sites), trusted
        self.adapters, self.logs, self.pids = home / "adapters", home / "logs", home / "state" / "pids.json"
        self.signatures = home / "signatures"
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // max(1, len(sites))))
        self.env = {
            "SITE_LIMITS": "", "SITE_PEERS": "", **os.environ, **QUIET, "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(home / "flwr"), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
            "BOUQUET_ADAPTERS": str(self.adapters), "BOUQUET_MODELS": str(models),
            "BOUQUET_ADMITTED": str(certs / "admitted"), "BOUQUET_SIGNATURES": str(self.signatures), **env,
        }  # fmt: skip
        self.site_env = {"OMP_NUM_THREADS": threads, "DOLLAR": "$"}
        self.pins = {site: pin(gpu) for site, gpu in gpus.items()}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.stop_leftovers()
        self.start_hub()
        self.register()
        for site in self.sites:
            self.start_site(site)
        self.wait_until_online(len(self.sites))

    def start_hub(self) -> None:
        """SuperLink and ServerApp executor. Raises HOST-06 when the SuperLink does not answer over TLS."""
        with self._written():
            for folder in (self.home / "state", self.home / "flwr", self.adapters, self.logs, self.signatures):
                folder.mkdir(parents=True, exist_ok=True)
        self._spawn("superlink", self.superlink())
        self._wait_for_superlink()
        self._spawn("serverapp", self.serverapp())

    def superlink(self) -> list[str]:
        return [
            sys.executable, "-m", "bouquet.flower.superlink", "--host=127.0.0.1", f"--port={self.port}",
            f"--ssl-ca-certfile={self.certs}/ca.crt",
            f"--ssl-certfile={self.certs}/superlink.crt", f"--ssl-keyfile={self.certs}/superlink.key",
            "--enable-supernode-auth", f"--database={self.home}/state/superlink.db", "--isolation=process",
            f"--superexec-auth-secret-file={self.certs}/superexec.secret", "--disable-runtime-dependency-installation",
        ]  # fmt: skip

    def serverapp(self) -> list[str]:
        return [
            sys.executable, "-m", "bouquet.flower.serverapp", f"--runtime-api-address={self.address}",
            f"--root-certificates={self.certs}/ca.crt", f"--superexec-auth-secret-file={self.certs}/superexec.secret",
        ]  # fmt: skip

    def register(self) -> None:
        """Admit every key of certs/admitted; a known one is left alone."""
        command = [
            sys.executable,
            "-m",
            "bouquet.flower.register",
            self.address,
            str(self.certs / "ca.crt"),
            str(self.certs / "admitted"),
        ]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        if done.returncode:
            raise self._error("HOST-06", found=done.stdout + done.stderr, why="it refused a site's key")

    def start_site(self, name: str, hub: str = "") -> None:
        """Start one SuperNode; it connects to `hub`, or straight to this deployment's SuperLink."""
        settings = {
            "site-name": name, "data-path": toml(self.sites[name]), "models-path": toml(self.models),
            "cache-path": toml(self.home / "cache" / name), "limits": "$SITE_LIMITS",
            "peers": "$SITE_PEERS", "key-path": toml(self.certs / f"{name}.key"),
        }  # fmt: skip
        self._spawn(name, [
            sys.executable, "-m", "bouquet.flower.supernode", f"--superlink={hub or self.address}",
            f"--root-certificates={literal(self.certs)}/ca.crt",
            f"--auth-supernode-private-key={literal(self.certs)}/{name}.key",
            "--host=127.0.0.1", f"--port={free_port()}",
            "--node-config=" + " ".join(f'{key}="{value}"' for key, value in settings.items()),
            *([f"--trusted-entities={literal(self.trusted)}"] if self.trusted else []),
        ], self.site_env | self.pins.get(name, {}))  # fmt: skip

    def wait_until_online(self, count: int, timeout: float = 600) -> None:
        """Wait for `count` sites, unless one's process ends: on a slow host each needs minutes for its imports.

        A site that was killed may come back after 66 s, when its old session has ended.
        """
        end = time.monotonic() + timeout
        while (online := nodes_online()) < count:
            dead = [name for name in self.sites if name in self.running and self.running[name].poll() is not None]
            if dead or time.monotonic() > end:
                logs = "".join((self.logs / f"{name}.log").read_text()[-800:] for name in dead)
                raise self._error("HOST-07", found=f"{online} of {count} online; ended: {dead} {logs}")
            time.sleep(1)

    def stop_site(self, name: str) -> None:
        process = self.running.pop(name)
        end_group(process.pid)
        process.wait()
        with contextlib.suppress(BouquetError):  # a full disk keeps nothing from ending
            self._note_pids()

    def stop(self) -> None:
        """Stop what this object started: sites first, so that they can say goodbye to the hub."""
        for name in reversed(list(self.running)):
            self.stop_site(name)

    def stop_leftovers(self) -> None:
        """End the processes that an earlier start left behind (a --keep, or a kill)."""
        try:
            left = json.loads(self.pids.read_text()).values()
        except (OSError, ValueError, AttributeError):  # none, or torn by a crash that left no process
            left = ()
        for pid in left:
            args = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True).stdout
            if str(self.certs) in args or literal(self.certs) in args:
                end_group(pid)
        self.pids.unlink(missing_ok=True)

    def fetch(self, run_id: str) -> Path:
        return self.adapters / run_id

    def _spawn(self, name: str, command: list[str], env: Mapping[str, str] = {}) -> None:
        with self._written():
            log = (self.logs / f"{name}.log").open("w")
        with log:
            self.running[name] = subprocess.Popen(
                command,
                cwd=self.home,
                env={**self.env, **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._note_pids()

    def _note_pids(self) -> None:
        half = self.pids.with_suffix(".new")
        with self._written():
            half.write_text(json.dumps({name: process.pid for name, process in self.running.items()}))
            half.replace(self.pids)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """What is written within. Errors: HOST-06, no room or no right."""
        try:
            yield
        except OSError as error:
            found = f"{self.home}: {error.strerror or error}"
            raise self._error("HOST-06", found=found, why="the deployment's folder cannot be written") from None

    def _wait_for_superlink(self, timeout: float = 120) -> None:
        """Until it answers, unless it has ended, or has neither spoken nor computed for `timeout` seconds.

        A slow host needs minutes for imports and a change of the database: that is said, and nothing ends for it.
        """
        tls, why = ssl.create_default_context(cafile=str(self.certs / "ca.crt")), ""
        log, alive, began = self.logs / "superlink.log", Alive(self.running["superlink"].pid), time.monotonic()
        told = began
        while self.running["superlink"].poll() is None and alive.silent(log) < timeout:
            if time.monotonic() - told > TELL:
                told, said = time.monotonic(), log.read_text(errors="replace").splitlines() or ["nothing yet"]
                line = f"the hub still starts ({told - began:.0f} s); it says: {text.line(said[-1], 100)}"
                print(line, file=sys.stderr, flush=True)
            try:
                urllib.request.urlopen(f"https://{self.address}/health", timeout=5, context=tls).close()
                return
            except (OSError, http.client.HTTPException) as error:  # a slow one may take the connection and no question
                why = str(reason := getattr(error, "reason", error))
                if isinstance(reason, ssl.SSLCertVerificationError):
                    break
            time.sleep(0.2)
        end = log.read_text(errors="replace")[-800:]
        raise self._error("HOST-06", found=f"{why} {end}", why="the SuperLink did not start")

    def _error(self, code: str, *, found: str, **facts: str) -> BouquetError:
        fix = f"see {self.logs}; scripts/certs check"
        return BouquetError(code, found=" ".join(found.split()), fix=fix, **facts)


class Alive:
    """Whether a process that does not answer yet does something: its log grows, or it uses the processor."""

    LOOK = 3.0  # seconds between two looks, which cost a process

    def __init__(self, pid: int) -> None:
        self.pid, self.seen, self.since, self.looked = pid, (0, ""), time.monotonic(), 0.0

    def silent(self, log: Path) -> float:
        """Seconds since it was last seen to do something."""
        now = time.monotonic()
        if now - self.looked > self.LOOK:
            used = subprocess.run(["ps", "-o", "time=", "-p", str(self.pid)], capture_output=True, text=True).stdout
            if (seen := (log.stat().st_size if log.exists() else 0, used)) != self.seen:
                self.seen, self.since = seen, now
            self.looked = now
        return now - self.since


def literal(path: Path) -> str:
    """A path as an argument of bouquet/flower/supernode.py, which takes $NAME for a variable."""
    return str(path).replace("$", "${DOLLAR}")


def toml(path: Path) -> str:
    """A path as it stands between quotation marks in --node-config, where these, \\ and $ would mean something else."""
    return re.sub(r'["\\$\x00-\x1f\x7f]', lambda found: f"\\u{ord(found[0]):04x}", str(path))


def pin(gpu: str) -> dict[str, str]:
    """The environment of a process that sees this GPU alone; CUDA numbers them as nvidia-smi does, where it would by
    speed.
    """
    return {"SITE_GPU": gpu, "CUDA_VISIBLE_DEVICES": "" if gpu == "none" else gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def files() -> list[str]:
    """The names of the project's files: what git has or would take; in a folder that is none of git's, by the rules of
    .gitignore.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return sorted(filter(None, done.stdout.split("\0")))
    ignored = GitIgnoreSpec.from_lines([".git/", ".ruff_cache/", *(ROOT / ".gitignore").read_text().splitlines()])
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored.match_file(f"{here / name}/")]
        found += [str(here / name) for name in names if not ignored.match_file(here / name)]
    return sorted(found)


def clone(to: Path) -> Path:
    """What git would clone of this checkout (and what is new and not ignored), with its .venv; `to` itself."""
    for name in files():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
            (to / name).chmod((ROOT / name).stat().st_mode | 0o444)
    (to / ".venv").symlink_to(ROOT / ".venv")
    return to


def end_group(pid: int) -> None:
    """End a process and all that it started: ask its group, wait up to 15 s for the process, insist."""
    try:
        os.killpg(pid, signal.SIGTERM)
        end = time.monotonic() + 15
        while is_alive(pid) and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def is_alive(pid: int) -> bool:
    """Whether a process still runs; our own child is reaped on the way."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:  # not our child
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
