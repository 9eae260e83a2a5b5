"""What the checks of `scripts/bench accept` share: one folder, one GPU, photos, base models, a hub with two sites, and an end to all of it.

Enters: the device and the sizes. Leaves: nothing; the folder is removed, and every process that was started is ended.
This process never uses CUDA itself, so that each check has the GPU as a site would find it: what computes runs in a process of its own
(accept_child.py), and the GPU is looked at through NVML. Photos, base model and hub are made beside the first checks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pynvml
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListNodesResponse, ListRunsRequest, ListRunsResponse, StartRunRequest, StartRunResponse
from flwr.proto.fab_pb2 import Fab

from app import gpu
from scripts._bench import watch
from scripts._deployment import ROOT, Processes, free_port, pin
from scripts._hostile import CONTROL, Door
from scripts._sign import bundle

Some = TypeVar("Some")
ONE, BOTH = ("site-1",), ("site-1", "site-2")
METERED = {"gpu-utilisation": pynvml.nvmlDeviceGetUtilizationRates, "gpu-joules": pynvml.nvmlDeviceGetTotalEnergyConsumption}
WORDS = 3000  # characters of each log that are kept where a check fails
LOOK = 0.1  # seconds between two looks at something that is being waited for


class Late(Exception):
    """Something did not happen in its time; `str()` says what."""


class Wrong(Exception):
    """Something is not as it should be; `str()` says what was found."""


class Skip(Exception):
    """There is nothing to check here; `str()` says why."""


@dataclass(frozen=True)
class Sizes:
    """How much each check does. photos: of site-1 and site-2, `side` pixels; mini_*, sd15_*: a run's keys."""

    kind: str
    photos: tuple[int, int]
    side: int
    mini_resolution: int
    mini_batch: int
    mini_steps: int
    sd15_resolution: int
    sd15_batch: int
    sd15_steps: int
    long_steps: int  # of a round that is killed in the middle
    memory_batch: int  # of mini
    loop: tuple[int, int, int]  # steps, repeats, largest batch
    matrix: int


FULL = Sizes("sd15", (110, 24), 512, 64, 16, 30, 512, 8, 50, 400, 512, (8, 2, 64), 8192)
TINY = Sizes("sd15-tiny", (12, 8), 32, 32, 4, 8, 16, 4, 4, 80, 64, (2, 1, 16), 256)


class Deployment(Processes):
    """A hub and two sites as processes, started site by site; what has once been ended for good starts nothing more.

    Runs are started and judged over the Control API: it costs nothing, where `flwr` would cost a process each time.
    """

    def __init__(self, home: Path, certs: Path, sites: Mapping[str, Path], models: Path, gpu: str) -> None:
        usual = {"HF_HUB_OFFLINE": "1", "SITE_KEEP": "", "SITE_LIMITS": ""}  # what is accepted is what everybody gets
        super().__init__(home, certs, free_port(), sites, usual, models=models, gpus=dict.fromkeys(sites, gpu))
        self.door = Door("127.0.0.1", self.port, certs / "ca.crt")
        self.caches = {name: home / "cache" / name for name in sites}
        self.closing = threading.Lock()
        self.closed = False

    # --- up and down ---------------------------------------------------------------------------------------------------------

    def _spawn(self, *args: Any, **more: Any) -> None:
        with self.closing:
            if self.closed:
                raise Late("the command is ending")
            super()._spawn(*args, **more)

    def down(self) -> None:
        """End everything at once: nobody will miss a goodbye."""
        with self.closing:
            self.closed = True
        for process in self.running.values():
            kill(process)

    def serve(self, names: Sequence[str], desk: Desk) -> None:
        """Have these sites online, and no other."""
        for name in set(self.sites) - set(names):
            if name in self.running:
                self.stop_site(name)
        for name in names:
            if name in self.running and self.running[name].poll() is not None:
                self.stop_site(name)
            if name not in self.running:
                self.start_site(name)
        desk.until(lambda: self.online() == len(names), 90, f"{', '.join(names)} online, and nobody else", 0.4)

    # --- the hub's answers ---------------------------------------------------------------------------------------------------

    def online(self) -> int:
        """Sites that are online; -1 while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-nodes", ListNodesRequest())
        return sum(node.status == "online" for node in ListNodesResponse.FromString(answer.body).nodes_info) if answer.status == 200 else -1

    def start_run(self, config: Mapping[str, Any]) -> str:
        """What `flwr run` sends; the run's id. Errors: Wrong where the hub does not take it."""
        fab = Fab(hash_str=hashlib.sha256(content := bundled()).hexdigest(), content=content)
        answer = self.door.call(CONTROL + "start-run", StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config))))
        if answer.status != 200:
            raise Wrong(f"the hub does not start a run: {answer}")
        return str(StartRunResponse.FromString(answer.body).run_id)

    def state(self, run: str) -> str:
        """As `flwr ls` says it; '' while the hub does not answer."""
        answer = self.door.call(CONTROL + "list-runs", ListRunsRequest(run_id=int(run)))
        if answer.status != 200:
            return ""
        status = ListRunsResponse.FromString(answer.body).run_dict[int(run)].status
        return f"{status.status}:{status.sub_status}".rstrip(":")

    # --- what can be seen from outside ---------------------------------------------------------------------------------------

    def said(self, run: str) -> dict[str, Any]:
        """The run's status.json; {} while there is none."""
        return read(self.adapters / run / "status.json")

    def history(self, run: str) -> dict[str, Any]:
        """The run's history.json; {} where it left none."""
        return read(self.adapters / run / "history.json")

    def log(self, name: str) -> str:
        file = self.logs / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def workers(self) -> set[int]:
        """Ids of the processes that take messages at any site."""
        sessions = {process.pid: name for name, process in self.running.items() if name in self.sites}
        return {process.pid for _, process in watch.processes(sessions) if process.name == watch.MESSAGE}


@cache
def bundled() -> bytes:
    """The app's bundle; Flower walks through the whole checkout for it, seconds."""
    return bundle(ROOT)


def read(file: Path) -> dict[str, Any]:
    """A JSON file; {} where there is none, or half of one."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


class Child(subprocess.Popen):
    """A process in a session of its own; `log` has what it says on stderr."""

    log: Path


class World:
    """Everything that is made once. Used as a context: what was started is ended with it, and its folder removed."""

    def __init__(self, home: Path, device: str, sizes: Sizes) -> None:
        self.home, self.device, self.sizes = home, device, sizes
        self.cuda = device == "cuda"
        self.pin = first_gpu() if self.cuda else "none"
        self.models, self.certs, self.sites = home / "models", home / "certs", {name: home / "data" / name for name in BOTH}
        self.children: set[Child] = set()
        self.lock, self.closed = threading.Lock(), False
        self.makers = ThreadPoolExecutor(max_workers=3, thread_name_prefix="accept")
        self.made: dict[str, Future] = {}
        self.deployment: Deployment | None = None
        self.seen: Any = None  # what one check has seen and another one judges (accept_runs.Pair)
        (home / "logs").mkdir(parents=True)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            children = list(self.children)
        for child in children:
            kill(child)
        if self.deployment:
            self.deployment.down()
        self.makers.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.home, ignore_errors=True)

    # --- what is made beside the first checks ------------------------------------------------------------------------------

    def begin(self, wanted: Iterable[str], sites: Sequence[str] = ()) -> None:
        """Start to make what is wanted of `hub` (with these sites), `photos` and `base`; each is waited for where it is used."""
        makers = {"hub": lambda: self._hub(sites), "photos": self._photos, "base": self._base}
        for name, make in makers.items():
            if name in wanted:
                self.made[name] = self.makers.submit(make)

    def have(self, name: str, desk: Desk) -> Any:
        """What was begun under that name. Errors: its maker's."""
        return desk.wait(self.made[name], f"the {name}")

    def _photos(self) -> None:
        """Drawn flowers of mini's species, as large as photos: mini can learn them, and any other model can read them."""
        from PIL import Image

        from models.mini import draw

        side = (self.sizes.side, self.sizes.side)
        for number, (folder, count) in enumerate(zip(self.sites.values(), self.sizes.photos, strict=True), start=1):
            folder.mkdir(parents=True)
            lines = []
            for index, (picture, caption) in enumerate(draw.site_photos(number, count, 0)):
                picture.resize(side, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
                lines.append(json.dumps({"file_name": f"{index}.jpg", "text": caption}))
            (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")

    def _base(self) -> str:
        """models/bench, and its fingerprint; sites remember a fingerprint, and it is noted for them here."""
        self._mini()
        desk = Desk(self, 240)
        memory = self.home / "sites" / "cache" / BOTH[0]
        asked = {"kind": self.sizes.kind, "models": str(self.models), "memory": str(memory)}
        return desk.child("base", asked)["fingerprint"]

    def _mini(self) -> None:
        self.models.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (self.models / "mini").symlink_to(ROOT / "models" / "mini")

    def _hub(self, sites: Sequence[str]) -> Deployment:
        """Certificates, a hub, and the sites that are wanted first: they come while the first checks run."""
        self._mini()
        scripts = self.home / "scripts"
        scripts.mkdir()
        for script in ("certs", "_lib.sh"):
            shutil.copy(ROOT / "scripts" / script, scripts)  # it makes certificates in the folder above its own
        Desk(self, 60).command([scripts / "certs", *BOTH], self.home)
        home = self.home / "sites"
        for name in BOTH:
            (home / "cache" / name).mkdir(parents=True, exist_ok=True)
        self.deployment = Deployment(home, self.certs, self.sites, self.models, self.pin)
        self.deployment.closed = self.closed
        self.deployment.start_hub()
        self.deployment.register()
        for name in sites:
            self.deployment.start_site(name)
        bundled()
        return self.deployment

    # --- looking -------------------------------------------------------------------------------------------------------------

    def env(self) -> dict[str, str]:
        """Of a process that may use the GPU that the sites are pinned to, and no other."""
        return os.environ | pin(self.pin) | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def gpu_used(self) -> int | None:
        """Bytes of the pinned GPU that are in use, by whomever; None where nobody can say."""
        if not self.cuda:
            return None
        with suppress(gpu.GpuError):
            for device in gpu.devices()[1]:
                if device.uuid.startswith(self.pin):
                    return device.total - device.free
        return None

    def gpu_says(self) -> set[str]:
        """Which figures of a site's meter (app/gpu.py) there must be: an older GPU counts no energy, a slice of one has no figures."""
        says = {"gpu-peak-mib"}  # torch's own
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())):
                if pynvml.nvmlDeviceGetUUID(handle).startswith(self.pin):
                    for name, ask in METERED.items():
                        with suppress(pynvml.NVMLError):
                            ask(handle)
                            says.add(name)
            pynvml.nvmlShutdown()
        return says

    def logs(self, desk: Desk) -> dict[str, str]:
        """The last words of the check's own processes, of the sites and of the hub: the folder will be gone."""
        files = [process.log for process in desk.all] + (sorted(self.deployment.logs.glob("*.log")) if self.deployment else [])
        return {file.name: file.read_text(errors="replace")[-WORDS:] for file in files if file.is_file()}


def first_gpu() -> str:
    """The first GPU that CUDA may use here, by its UUID; where NVML cannot say, the first of CUDA's own."""
    with suppress(gpu.GpuError):
        if found := gpu.devices()[1]:
            return found[0].uuid
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


def kill(process: subprocess.Popen) -> None:
    """A process and all that it started, at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Desk:
    """One check's time and processes: all that it waits for ends with its time, and all that it started ends with it."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.end = world, time.monotonic() + seconds
        self.all: list[Child] = []

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self.all):
            self.over(process)

    def left(self, most: float = 1e9) -> float:
        """Seconds that are left to it, at most `most`. Errors: Late where none are."""
        if self.world.closed:
            raise Late("the command is ending")
        if (left := self.end - time.monotonic()) <= 0:
            raise Late("its time is over")
        return min(left, most)

    def until(self, what: Callable[[], Some], seconds: float, name: str, look: float = LOOK) -> Some:
        """The first true answer, asked every `look` seconds. Errors: Late, with what was waited for."""
        end = time.monotonic() + self.left(seconds)
        while not (found := what()):
            if time.monotonic() > end or self.world.closed:
                raise Late(f"{name}: not within {seconds:.0f} s")
            time.sleep(look)
        return found

    def wait(self, made: Future, name: str) -> Any:
        self.until(made.done, self.left(), name)
        return made.result()

    # --- processes -----------------------------------------------------------------------------------------------------------

    def start(self, command: list[Any], cwd: Path = ROOT, env: Mapping[str, str] = {}) -> Child:
        with self.world.lock:
            if self.world.closed:
                raise Late("the command is ending")
            log = self.world.home / "logs" / f"{len(list((self.world.home / 'logs').iterdir()))}.log"
            with log.open("w") as errors:
                process = Child(
                    [str(part) for part in command], cwd=cwd, env=self.world.env() | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, start_new_session=True,
                )  # fmt: skip
            process.log = log
            self.world.children.add(process)
            self.all.append(process)
        return process

    def command(self, command: list[Any], cwd: Path = ROOT, env: Mapping[str, str] = {}, codes: tuple[int, ...] = (0,)) -> str:
        """What a command says on stdout. Errors: Wrong where it ends with another code; Late, and then it has been ended."""
        return self.answer(self.start(command, cwd, env), codes)

    def answer(self, process: Child, codes: tuple[int, ...] = (0,)) -> str:
        try:
            said = process.communicate(timeout=self.left())[0]
        except subprocess.TimeoutExpired:
            raise Late(f"{named(process)} took too long") from None
        finally:
            self.over(process)
        if process.returncode not in codes:
            last = process.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Wrong(f"{named(process)} ended with {process.returncode}: {' '.join(last) or 'it said nothing'}")
        return said

    def begin(self, work: str, asked: Mapping[str, Any], env: Mapping[str, str] = {}) -> Child:
        """A piece of accept_child.py's work, in a process of its own."""
        return self.start([sys.executable, "-m", "scripts._bench.accept_child", work, json.dumps(asked)], env=env)

    def child(self, work: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer."""
        return last(self.answer(self.begin(work, asked)))

    def over(self, process: Child) -> None:
        """End it now, with all that it started."""
        kill(process)
        for pipe in (process.stdin, process.stdout):
            pipe.close()
        self.world.children.discard(process)


def named(process: Child) -> str:
    """A child's work, or a command's name."""
    program, *words = (str(word) for word in process.args)
    return " ".join(words[1:3] if words[:1] == ["-m"] else [Path(program).name, *words[:2]])


def last(said: str) -> dict[str, Any]:
    """The last line of a child's stdout, which is its answer."""
    return json.loads(said.strip().splitlines()[-1])
