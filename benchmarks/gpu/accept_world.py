"""What the checks of `scripts/bench accept` share: one folder, one GPU, photos, base models, a hub with two sites, and
an end to all of it.

Enters: the device and the sizes. Leaves: nothing; the folder is removed, and every process that was started is ended.
This process never uses CUDA itself, so that each check has the GPU as a site would find it: what computes runs in a
process of its own (accept_child.py), and the GPU is looked at through NVML. Photos, base model and hub are made beside
the first checks.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from app.site import gpu
from benchmarks.gpu.accept_desk import Child, Desk, kill
from benchmarks.gpu.accept_hub import Deployment
from bouquet import ROOT
from bouquet.data import listing
from bouquet.hub.deployment import pin

ONE, BOTH = ("site-1",), ("site-1", "site-2")
METERED = {
    "gpu-utilisation": pynvml.nvmlDeviceGetUtilizationRates,
    "gpu-joules": pynvml.nvmlDeviceGetTotalEnergyConsumption,
}
WORDS = 3000  # characters of each log that are kept where a check fails


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
TINY = Sizes("sd15-tiny", (12, 8), 32, 32, 4, 8, 16, 4, 4, 24, 64, (2, 1, 16), 256)


class World:
    """Everything that is made once. Used as a context: what was started is ended with it, and its folder removed."""

    def __init__(self, home: Path, device: str, sizes: Sizes, patience: float = 1.0) -> None:
        """patience: by how much longer than on an idle machine everything may take."""
        self.home, self.device, self.sizes, self.patience = home, device, sizes, patience
        self.cuda = device == "cuda"
        self.pin = first_gpu() if self.cuda else "none"
        self.models, self.certs, self.sites = (
            home / "models",
            home / "certs",
            {name: home / "data" / name for name in BOTH},
        )
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

    # --- what is made beside the first checks
    # ------------------------------------------------------------------------------

    def begin(self, wanted: Iterable[str], sites: Sequence[str] = ()) -> None:
        """Start to make what is wanted of `hub` (with these sites), `photos` and `base`; each is waited for where it is
        used.
        """
        makers = {"hub": lambda: self._hub(sites), "photos": self._photos, "base": self._base}
        for name, make in makers.items():
            if name in wanted:
                self.made[name] = self.makers.submit(make)

    def have(self, name: str, desk: Desk) -> Any:
        """What was begun under that name. Errors: its maker's."""
        return desk.wait(self.made[name], f"the {name}")

    def _photos(self) -> None:
        """Drawn flowers of mini's species, as large as photos: mini can learn them, any other model can read them."""
        from PIL import Image

        from app.site import privacy
        from app.site.photos import data
        from models.mini import draw

        side = (self.sizes.side, self.sizes.side)
        for number, (folder, count) in enumerate(zip(self.sites.values(), self.sizes.photos, strict=True), start=1):
            folder.mkdir(parents=True)
            captions = []
            for index, (picture, caption) in enumerate(draw.site_photos(number, count, 0)):
                picture.resize(side, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)
                captions.append((f"{index}.jpg", caption))
            listing.write(folder, captions)
            privacy.declare_public(folder, data.scan(folder).photos)

    def _base(self) -> str:
        """models/bench, and its fingerprint; sites remember a fingerprint, and it is noted for them here."""
        self._mini()
        desk = Desk(self, 240 * self.patience)
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
        Desk(self, 60 * self.patience).command([scripts / "certs", *BOTH], self.home)
        home = self.home / "sites"
        for name in BOTH:
            (home / "cache" / name).mkdir(parents=True, exist_ok=True)
        self.deployment = Deployment(home, self.certs, self.sites, self.models, self.pin)
        self.deployment.closed = self.closed
        self.deployment.start_hub()
        self.deployment.register()
        for name in sites:
            self.deployment.start_site(name)
        return self.deployment

    # --- looking
    # -------------------------------------------------------------------------------------------------------------

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
        """Which figures of a site's meter (app/site/gpu.py) there must be: an older GPU counts no energy, a slice of
        one has no figures.
        """
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
        files = [process.log for process in desk.all] + (
            sorted(self.deployment.logs.glob("*.log")) if self.deployment else []
        )
        return {file.name: file.read_text(errors="replace")[-WORDS:] for file in files if file.is_file()}


def first_gpu() -> str:
    """The first GPU that CUDA may use here, by its UUID; where NVML cannot say, the first of CUDA's own."""
    with suppress(gpu.GpuError):
        if found := gpu.devices()[1]:
            return found[0].uuid
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
