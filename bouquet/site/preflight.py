"""Will this site's first round work? `bouquet site check [--fast] [--json] [--run-config "batch-size=8"]`

Enters: the site's settings from the environment (`Settings`). Leaves: a line a check, pass, warn, fail or skip, with
the fix; exit code 1 where one failed. Cheap checks first; what a failed one makes pointless is skipped. --fast leaves
out decoding every photo and the training step. What is printed may name files of this site: it stays here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from app import families
from app.errors import BouquetError
from app.site import budget, gpu, privacy
from app.site.photos import data, folders, prior, views
from app.site.photos.images import BadImage
from app.site.photos.wording import Wording
from bouquet.site import reach
from bouquet.site.settings import Settings

MIB, GIB = 2**20, 2**30
DAYS = 30  # left to the hub's certificate
COUNTED = 100_000  # files that the fast part looks for; no more


@dataclass(frozen=True)
class Line:
    """One check's result. state: pass, warn, fail, skip; `text` may have further lines."""

    name: str
    state: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        first, *more = self.text.splitlines()
        return "\n".join(
            [
                f"{self.state}  {self.name:<9} {first}",
                *(f"      {'':<9} {line}" for line in more),
                *([f"      {'fix':<9} {self.fix}"] if self.fix else []),
            ]
        )


class Warn(Exception):
    """The check passes, but `str()` should be known; `fix` says what to do about it."""

    def __init__(self, text: str, fix: str) -> None:
        super().__init__(text)
        self.fix = fix


class Skip(Exception):
    """There is nothing to check; what builds on it is checked all the same."""


class Preflight:
    """The checks, in order; each returns its line's text, or raises Warn, Skip or a BouquetError."""

    NEEDS = {  # check: what must not have failed before
        "name": (), "gpu": (), "driver": ("gpu",), "others": ("gpu",), "disk": (),
        "hub": (), "clock": ("hub",), "key": ("clock",),
        "model": (), "data": (), "memory": ("gpu", "model", "data"),
        "decode": ("data",), "step": ("driver", "disk", "memory", "decode"),
    }  # fmt: skip
    SLOW = ("decode", "step")

    def __init__(self, settings: Settings) -> None:
        self.own = settings
        self.driver_found: gpu.Driver | None = None
        self.device: gpu.Device | None = None
        self.base: Path | None = None
        self.partition: data.Partition | None = None
        self.photos = 0

    def run(self, fast: bool) -> Iterator[Line]:
        """Every check's line, as it comes."""
        lost: set[str] = set()
        for name, needs in self.NEEDS.items():
            if fast and name in self.SLOW:
                continue
            if missing := [need for need in needs if need in lost]:
                line = Line(name, "skip", f"not checked: {', '.join(missing)} must pass first")
            else:
                line = self.line(name)
            if missing or line.state == "fail":
                lost.add(name)
            yield line

    def line(self, name: str) -> Line:
        try:
            return Line(name, "pass", getattr(self, f"check_{name}")())
        except Warn as warning:
            return Line(name, "warn", str(warning), warning.fix)
        except Skip as why:
            return Line(name, "skip", str(why))
        except BouquetError as error:
            return Line(name, "fail", f"{error}\n{error.found}", error.fix)
        except Exception as error:  # not foreseen: say so, and let the other checks go on
            return Line(
                name,
                "fail",
                f"{type(error).__name__}: {error}",
                "this is not a mistake that Bouquet knows; please report it",
            )

    # --- this machine
    # ----------------------------------------------------------------------------------------------------

    def check_name(self) -> str:
        if not self.own.name:
            raise reach.CheckError(
                "CHECK-09",
                found="SITE_NAME is empty",
                fix="set SITE_NAME to the name that the hub invited",
            )
        if not self.own.peers and self.own.config.secrecy != "masks":
            return self.own.name
        from app.site import secrecy

        node = {"peers": self.own.peers, "key-path": self.own.key}
        peers = secrecy.Own.read(node, self.own.name, self.own.cache).peers
        return f"{self.own.name}; hides its updates with {', '.join(sorted(peers.keys() - {self.own.name}))}"

    def check_gpu(self) -> str:
        if not self.own.gpu:
            import torch

            if torch.cuda.is_available():
                raise Warn(
                    "SITE_GPU is not set, and the training will take the first GPU it sees",
                    "set SITE_GPU; for the CPU: CUDA_VISIBLE_DEVICES='' as well",
                )
            return f"{gpu.NO_GPU}: this site trains on the CPU (SITE_GPU is not set)"
        gpu.check_pin(self.own.gpu)
        self.driver_found, found = gpu.devices()
        self.device = gpu.pinned(self.own.gpu, found)
        return f"{self.device.name} {self.device.uuid}, the only one visible"

    def check_driver(self) -> str:
        if not self.driver_found:
            raise Skip(gpu.NO_GPU)
        import torch

        if remark := gpu.check_driver(self.driver_found, torch.version.cuda):
            raise Warn(
                f"{self.driver_found.version}: {remark}",
                "works within one major version of CUDA; update the driver when you can",
            )
        return f"{self.driver_found.version} runs this image's CUDA {torch.version.cuda}"

    def check_others(self) -> str:
        if not self.device:
            raise Skip(gpu.NO_GPU)
        mine, used = self.device.processes, self.device.total - self.device.free
        if mine or used > GIB:
            whose = (
                ", ".join(f"process {pid} {size / MIB:.0f} MiB" for pid, size in mine.items())
                or "by processes that cannot be seen from here"
            )
            raise Warn(
                f"{used / MIB:.0f} MiB of the GPU are in use: {whose}",
                "end them, or pin another GPU; a round of this site's own may be running",
            )
        return "nobody else computes on the GPU"

    def check_disk(self) -> str:
        folder = self.own.cache
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise reach.CheckError(
                "CHECK-08",
                found=f"{folder} is no folder that user id {os.geteuid()} may write",
                fix="mount a volume or folder there that this user may write",
            )
        free = shutil.disk_usage(folder).free
        if free < GIB // 4:
            raise reach.CheckError(
                "CHECK-08",
                found=f"{folder} has {free / MIB:.0f} MiB left",
                fix="free some space: encoded photos take about 80 kB (64²) to 130 kB (512²) each",
            )
        if free < 2 * GIB:
            raise Warn(
                f"{folder} has {free / GIB:.1f} GiB left", "make room: some thousands of encoded photos fill a gigabyte"
            )
        return f"{free / GIB:.0f} GiB free in {folder}"

    # --- the hub
    # ---------------------------------------------------------------------------------------------------------

    def check_hub(self) -> str:
        days = reach.certificate(self.own.hub, self.own.ca)
        if days < DAYS:
            raise Warn(
                f"{self.own.hub} answers; its certificate expires in {days:.0f} days",
                "remind the hub's operator: scripts/certs renew; nothing changes here",
            )
        return f"{self.own.hub} answers, its certificate holds for {days:.0f} days"

    def check_clock(self) -> str:
        ahead = reach.clock(self.own.hub, self.own.ca)
        text = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the hub's (to the second)"
        if ahead > reach.AHEAD - 3 or ahead < -60:
            raise Warn(
                text, f"the hub takes {reach.BEHIND} s behind to {reach.AHEAD} s ahead: timedatectl set-ntp true"
            )
        return text

    def check_key(self) -> str:
        reach.admitted(self.own.hub, self.own.ca, self.own.key)
        if (mode := self.own.key.stat().st_mode & 0o077) != 0:
            raise Warn(
                f"admitted, but others on this machine may read the key (mode …{mode:02o})", f"chmod 600 {self.own.key}"
            )
        return "the hub has admitted this site's key"

    # --- model and data
    # --------------------------------------------------------------------------------------------------

    def check_model(self) -> str:
        from app import bases, model
        from app.site import optimisers, train

        optimisers.check(self.own.config)
        self.base = base = bases.locate(self.own.config.base_model, self.own.models)
        families.check(base).check_run(self.own.config)
        name, memory = self.own.config.base_model, self.own.cache if os.access(self.own.cache, os.W_OK) else None
        sums = model.fingerprint(base, memory)["base"]
        if not self.own.fingerprint:
            raise Warn(f"{name} {sums[:16]}, not compared", "set BASE_FINGERPRINT to the one in the hub's join kit")
        if not model.is_base(base, sums, self.own.fingerprint):  # an older kit's may be of the former rule
            train.check_base(name, base, sums, self.own.fingerprint)
        return f"{name} {sums[:16]}, the same as the hub's"

    def check_data(self) -> str:
        """What the fast part may ask: is there something to read at all?"""
        root, private = self.own.data.resolve(), self.own.limits.private()
        self.photos = sum(1 for _ in islice((entry for entry in folders.entries(root) if not entry.reason), COUNTED))
        if self.photos < private.least_photos:
            self._enough(data.scan(root, memory=self.own.cache))  # says what is wrong
        return f"{self.photos}{' or more' if self.photos == COUNTED else ''} pictures in {root}, not yet looked at"

    def check_decode(self) -> str:
        """Every photo to its last pixel, as training will."""
        found, bad, enlarged = data.scan(self.own.data, memory=self.own.cache), {}, 0
        shapes = views.Plan.of(self.own.config, families.of(self.base).multiple if self.base else 8).smallest
        for photo in found.photos:
            try:
                size = photo.read().size
                enlarged += views.is_small(size, views.nearest(size, list(shapes)))
            except BadImage as error:
                bad[photo.key] = error.reason
        classes = prior.scan(self.own.data, self.own.cache) if self.own.config.prior_loss_weight else None
        self.partition = partition = replace(self._counted(found.without(bad).require(2)), enlarged=enlarged)
        kind, counts = self._enough(partition, classes.photos if classes else ()), partition.counts
        if counts.keys() - {"images", "system"} or partition.cut:
            fix = "what is set aside is left out, and what is cut is not read; mend or remove it when you can"
            raise Warn(partition.report(), fix)
        more = f"; {len(classes.photos)} class images beside them" if classes else ""
        own = f", and {counts['system']} files are a computer's own" if "system" in counts else ""
        own += f"; {enlarged} are smaller than what is trained on, and enlarged" if enlarged else ""
        return f"all {len(partition.photos)} pictures can be read; they are {kind}{own}{more}"

    def _counted(self, partition: data.Partition) -> data.Partition:
        """With its captions counted that the base model reads only the beginning of, where one is at hand."""
        from app.site import cache

        return cache.counted(partition, self.base, Wording.of(self.own.config)) if self.base else partition

    def _enough(self, partition: data.Partition, classes: tuple[data.Photo, ...] = ()) -> str:
        """Whether the photos are private or public. Errors: SITE-02, TRUST-03 where a round would be about too few of
        them.
        """
        public = privacy.is_public(partition.folder, (*partition.photos, *classes))
        rules, promise, config = self.own.limits, self.own.promise, self.own.config
        rules = rules if public else rules.private()
        rules = rules.silent() if promise else rules
        # how many are held out does not depend on the secret
        some = privacy.PUBLIC if public else privacy.Privacy(bytes(32))
        train, _ = privacy.divide(partition, some, rules, config, each=promise is not None)
        budget.check(config, promise)
        if promise is None:
            return str(some)
        terms = promise.terms(config, int(some.number(len(train))))
        budget.check_room(self.own.cache, promise, terms, config, run="", number=1)
        return f"{some}, each of them promised epsilon {promise.epsilon:g} (bouquet site privacy says what is spent)"

    # --- training
    # --------------------------------------------------------------------------------------------------------

    def check_memory(self) -> str:
        from bouquet.site import trial

        config, (free, what) = self.own.config, self._free()
        try:
            assert self.base is not None  # NEEDS
            guess = trial.estimated(config, self.base, self.device is not None, self.photos)
        except Exception as error:  # an estimate is not worth a site's round
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise Warn(
                f"what a round takes cannot be estimated ({why}); {free / GIB:.1f} GiB of {what} free",
                "the training step of the whole check says for certain",
            ) from None
        text = (
            f"{config.base_model} at {config.sides[-1]}², {config.batch_size} images a step: about"
            f" {guess.need / GIB:.1f} GiB of {what}, {free / GIB:.1f} GiB free"
        )
        if free < guess.floor:
            raise gpu.GpuError("GPU-05", found=text, fix=self._take_less())
        if free < guess.need:
            raise Warn(
                text, f"tight, and an estimate: the training step says for certain. If it fails: {self._take_less()}"
            )
        return text

    def _take_less(self) -> str:
        """What helps where the memory is too small."""
        own = (
            ""
            if self.own.config.gradient_checkpointing
            else "set SITE_CHECKPOINTING=1 (a third slower, a fraction of the memory), "
        )
        return (
            f"{own}ask the hub for a smaller batch-size (with gradient-accumulation) or resolution or for"
            " base-precision=nf4, or give this site more memory"
        )

    def _free(self) -> tuple[int, str]:
        """Bytes, and of what."""
        from bouquet.site import estimate

        return (self.device.free, "GPU memory") if self.device else (estimate.free_ram(), "RAM")

    def check_step(self) -> str:
        """A real step on real photos."""
        import torch

        from bouquet.site import trial

        assert self.base is not None and self.partition is not None  # NEEDS
        try:
            return trial.step(self.own.config, self.base, self.partition, self.own.cache)
        except torch.OutOfMemoryError as error:
            found = str(error).splitlines()[0]
            raise gpu.GpuError("GPU-05", found=found, fix=self._take_less()) from None


def check(fast: bool = False, as_json: bool = False, run_config: str = "") -> int:
    """Print the lines as they come; 1 where one failed."""
    try:
        settings = Settings.read(os.environ, run_config)
    except BouquetError as error:
        print(error.report())
        return 1
    lines: list[Line] = []
    for line in Preflight(settings).run(fast):
        lines.append(line)
        if not as_json:
            print(line, flush=True)
    counts: dict[str, Any] = {
        state: sum(line.state == state for line in lines) for state in ("pass", "warn", "fail", "skip")
    }
    if as_json:
        print(json.dumps({"ok": not counts["fail"], "site": settings.name, "checks": [asdict(line) for line in lines]}))
    else:
        verdict = "not ready" if counts["fail"] else "ready"
        print(f"{verdict}: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
    return int(counts["fail"] > 0)
