"""A site's share of a round: evaluate what arrived, take the local steps, and say what it cost.

Enters: a net that holds the global adapter, encoded photos and the run's config. Leaves: the net trained in place,
and metrics. `accelerate` drives device, precision and gradient accumulation; the base stays frozen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from app import bases, families, model
from app.config import RunConfig
from app.errors import ModelError, SiteError
from app.model import Net
from app.site import cache, diffusion, dp, factors, optimisers, privacy, quantised, rate
from app.site.accountant import Terms
from app.site.budget import Promise
from app.site.limits import NO_LIMITS, Limits
from app.site.photos import data, prior
from app.site.photos.views import Plan
from app.site.photos.wording import Wording

# times as many images a pass in evaluation as in training: a third faster, and without gradients it takes less memory
WIDER = 4


def accelerator(config: RunConfig) -> Accelerator:
    """bf16 where asked for, or where `auto` finds CUDA that has it; else float32."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and has_bf16)
    return Accelerator(
        mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=config.gradient_accumulation
    )


def check_base(name: str, folder: Path, own: str, hubs: str) -> None:
    """Errors: MODEL-04 when the two fingerprints differ. '' as the hub's skips the comparison."""
    if hubs and own != hubs:
        raise ModelError(
            "MODEL-04",
            found=f"{name} in {folder} has fingerprint {own[:16]}, the hub's is {hubs[:16]}",
            fix="copy the hub's version of the base model to this site",
        )


def halved(accelerator: Accelerator) -> bool:
    """Whether the frozen base is kept in bf16: on a GPU alone, where the arithmetic is bf16 too."""
    return bool(accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda")


def load(base: Path, config: RunConfig, accelerator: Accelerator) -> tuple[diffusion.Objective, Net]:
    """(what is learned, the net with a fresh adapter on the accelerator's device). Errors: CONFIG-05, MODEL-03,
    SITE-16.
    """
    objective = diffusion.Objective.of(base)
    objective.family.check_run(config)
    optimisers.check(config)
    net = model.load_net(base, torch.bfloat16 if halved(accelerator) else torch.float32)
    computes = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    quantised.quantise(net, config.base_precision, computes, accelerator.device)
    model.add_adapter(net, objective.family, config)
    if config.gradient_checkpointing:
        net.enable_gradient_checkpointing()
    return objective, net.to(accelerator.device)


class Site:
    """One site's model and encoded photos, ready to take a round, and another one."""

    def __init__(
        self,
        config: RunConfig,
        models: Path,
        folder: Path,
        cached: Path,
        base_fingerprint: str,
        began: float | None = None,
        *,
        limits: Limits = NO_LIMITS,
        secret: privacy.Secret = privacy.Secret.KEPT,
        promise: Promise | None = None,
    ) -> None:
        """As `get_ready`, for the first time."""
        self.config, self.models, self.folder, self.cached = config, models, folder, cached
        self.limits, self.secret, self.promise = limits, secret, promise
        self.fits = config  # the images a pass that fit into the GPU's memory
        self.accelerator = accelerator(config)
        self.encoded_from: tuple[object, ...] = ()  # what the encoded photos, and the net, were made from
        self.loaded_from: tuple[object, ...] = ()
        self.get_ready(base_fingerprint, began)

    def get_ready(self, base_fingerprint: str, began: float | None = None) -> None:
        """Load what has changed since the last time, which is everything at first. Errors: MODEL-01..04, -06,
        SITE-01..07, -14, -15, TRUST-03.

        base_fingerprint: the hub's; '' skips the comparison. began: when the message's work began (time.monotonic).
        """
        self.clock = Clock(self.accelerator.device, began)
        self.clock.lap("start")
        base = bases.locate(self.config.base_model, self.models)
        sums = model.fingerprint(base, self.cached)
        check_base(self.config.base_model, base, sums["base"], base_fingerprint)
        family = families.of(base)
        encode_from = (
            sums["vae"],
            *(sums[part] for part in family.words),
            data.stamp(self.folder),
            privacy.stamp(self.folder),
            prior.stamp(self.folder) if self.config.prior_loss_weight else "",
        )
        if encode_from != self.encoded_from:
            self._encode(base, sums)
            self.encoded_from = encode_from
        self.clock.lap("encode")
        load_from = (sums[family.net], sums["scheduler"])
        if load_from != self.loaded_from:
            self.objective, self.net = load(base, self.config, self.accelerator)
            self.loaded_from = load_from
        self.clock.lap("load")

    def _encode(self, base: Path, sums: dict[str, str]) -> None:
        partition = data.scan(self.folder, memory=self.cached)
        classes = prior.scan(self.folder, self.cached) if self.config.prior_loss_weight else None
        everything = (*partition.photos, *(classes.photos if classes else ()))
        self.privacy = privacy.of(self.folder, everything, self.cached, self.secret)
        if self.privacy.private:
            self.limits = self.limits.private()
            if classes:
                self.limits.check_classes(len(classes.photos))
        if self.promise:
            self.limits = self.limits.silent()
        left, multiple = len(partition.photos) + 1, families.of(base).multiple
        while len(partition.photos) < left:  # again where some cannot be decoded: who is trained on follows from all
            left = len(partition.photos)
            how = {"each": self.promise is not None}
            self.photos, held_out = privacy.divide(partition, self.privacy, self.limits, self.config, **how)
            trained = frozenset(p.key for p in self.photos)
            # with a promise a pass has one image, and where a photo is cropped may not hang on there being another one
            least = 1 if self.promise else self.limits.floor("min-step-images")
            plan, wording = Plan.of(self.config, multiple, trained, least), Wording.of(self.config)
            partition, rows = cache.encode(partition, base, sums, plan, self.cached, self.accelerator.device, wording)
        self.partition = partition
        self.train, self.held_out = rows(self.photos), rows(held_out)
        self.prior = None
        if classes:  # with their captions as they are: the trigger word is what the photos show
            cached = prior.cache(self.cached)
            plan = Plan.of(self.config, multiple, frozenset(p.key for p in classes.photos), least)
            found, rows = cache.encode(classes, base, sums, plan, cached, self.accelerator.device)
            print(f"bouquet: class images: {found.report()}", flush=True)
            self.prior = rows(found.photos)

    @property
    def told(self) -> int:
        """How many photos the site says that it trains on."""
        return (self.promise.photos if self.promise else 0) or int(self.privacy.number(len(self.photos)))

    @property
    def terms(self) -> Terms | None:
        """On which a round is trained here, where the site has promised anything. Errors: TRUST-16, TRUST-18."""
        return self.promise.terms(self.config, self.told) if self.promise else None

    def evaluate(self) -> float:
        """Loss on the held-out photos, over fixed noise and timesteps."""
        timesteps, size = self.config.validation_timesteps, WIDER * self.config.batch_size
        self.net.eval()
        with self.accelerator.autocast():
            loss = diffusion.validation_loss(
                self.net, self.objective, self.held_out, self.accelerator.device,
                timesteps=timesteps, batch_size=size, digest=self.privacy.digest,
            )  # fmt: skip
        self.clock.lap("evaluate")
        return loss

    def fit(self, seed: int, number: int = 1) -> float:
        """`local-steps` optimiser steps of round `number`; returns their mean loss. Same seed, same steps, bit for bit
        on one CPU set-up.

        Out of GPU memory: once more from the same adapter, with half the images a pass and twice the passes; then
        SITE-13.
        """
        start = model.adapter_of(self.net)
        loss = self._try_to_fit(seed, number)
        if loss is None and self.fits is self.config and self.config.batch_size > 1:
            self.fits = replace(
                self.config,
                batch_size=self.config.batch_size // 2,
                gradient_accumulation=2 * self.config.gradient_accumulation,
            )
            print(f"bouquet: out of GPU memory; once more with {self.fits.batch_size} images a pass", flush=True)
            self.net.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            model.apply_adapter(self.net, start)
            loss = self._try_to_fit(seed, number)
        if loss is None:
            raise self._out_of_memory(f"also with half of {self.config.batch_size} images a pass")
        self.clock.lap("train")
        return loss

    def fit_privately(self, terms: Terms, number: int = 1) -> float:
        """The same on these terms, which have been paid (budget.py); nothing of it can be repeated. Out of GPU memory
        is SITE-13: a pass has one image already, and what was drawn is not drawn again.
        """
        try:
            one = accelerator(self.config)
            with factors.narrowed(self.net, self.limits.lowered(self.config)):
                loss = dp.fit(self.net, self.objective, self.train, self.config, one, terms, number)
        except torch.OutOfMemoryError:
            loss = None
        if loss is None:
            raise self._out_of_memory("with one image a pass")
        self.clock.lap("train")
        return loss

    def _try_to_fit(self, seed: int, number: int) -> float | None:
        """The mean loss, or None when the GPU's memory is too small: by then its error is gone, whose traceback held
        what had filled it.
        """
        try:
            one = accelerator(self.fits)
            with factors.narrowed(self.net, self.limits.lowered(self.config)):
                return fit(self.net, self.objective, self.train, self.fits, one, seed, number, self.prior)
        except torch.OutOfMemoryError:
            return None

    def _out_of_memory(self, how: str) -> SiteError:
        return SiteError(
            "SITE-13",
            found=f"out of memory {how} at {self.config.sides[-1]} pixels",
            fix=(
                "free the GPU of other programs (nvidia-smi shows them), or ask the hub for a smaller batch-size or"
                " resolution"
            ),
        )


def fit(
    net: Net,
    objective: diffusion.Objective,
    encoded: cache.Encoded,
    config: RunConfig,
    accelerator: Accelerator,
    seed: int,
    number: int = 1,
    prior: cache.Encoded | None = None,
) -> float:
    """Steps of the adapter alone (optimisers.py); the optimiser starts afresh each round (its moments belong to another
    adapter), and its rate is where the run is in round `number` (rate.py).

    Nothing in a step waits for the GPU: batches and noise are drawn on the host while it computes, and the loss is
    read at the end. With proximal_mu > 0 the adapter is pulled to the one that arrived.

    With class images (`prior`), a pass adds prior_loss_weight times their loss, of as many of them, with noise of their
    own: as diffusers' train_dreambooth.py, whose prior loss has no min-SNR weights. There they are learned as photos
    are; here, unless the run says so, to be what the base model makes of them (prior_target). They are drawn by a
    generator of their own, so that the photos' batches and noise are those of a run without them.
    """
    generator, device = torch.Generator().manual_seed(seed), accelerator.device
    trained = factors.trained(net, config, number)
    arrived = optimisers.anchors(config, trained)
    optimiser = optimisers.of(config, trained, device)
    # the net stays as it is: its precision is autocast's, and another round may come
    optimiser_ = accelerator.prepare(optimiser)
    batches, total = in_buckets(encoded.buckets, config.batch_size, generator), torch.zeros((), device=device)
    class_losses = iter(()) if prior is None else _class_losses(net, objective, prior, config, device, seed + 1)
    net.train()
    factor, step = rate.factors(config), (number - 1) * config.local_steps
    passes = config.local_steps * config.gradient_accumulation
    for _ in range(passes):
        pick = next(batches)
        blank = torch.rand(len(pick), generator=generator) < config.caption_dropout
        rows, given = encoded.batch(pick, blank, encoded.words(pick, generator), generator)
        asked = objective.at(given["size"], config.resolution) if config.resolutions else objective
        latents, given = diffusion.to_device(rows, device), diffusion.moved(given, device)
        with accelerator.accumulate(net), accelerator.autocast():
            loss = diffusion.noise_loss(
                net, asked, latents, given, generator,
                min_snr_gamma=config.min_snr_gamma, noise_offset=config.noise_offset,
            )  # fmt: skip
            accelerator.backward(loss)
            if prior is not None:  # by now the photos' pass has left the memory; the gradients add up
                weighed = config.prior_loss_weight * next(class_losses)
                accelerator.backward(weighed)
                loss = loss.detach() + weighed
            if accelerator.sync_gradients:
                optimisers.pull(config, trained, arrived)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimiser.param_groups[0]["lr"] = config.learning_rate * factor(step)
                step += 1
            optimiser_.step()
            optimiser_.zero_grad()
        total += loss.detach()
    return total.item() / passes


def _class_losses(
    net: Net, objective: diffusion.Objective, prior: cache.Encoded, config: RunConfig, device: torch.device, seed: int
) -> Iterator[torch.Tensor]:
    """The loss on one batch of class images after another."""
    generator = torch.Generator().manual_seed(seed)
    for pick in in_buckets(prior.buckets, config.batch_size, generator):
        rows, given = prior.batch(pick, None, prior.words(pick, generator), generator)
        asked = objective.at(given["size"], config.resolution) if config.resolutions else objective
        latents, given = diffusion.to_device(rows, device), diffusion.moved(given, device)
        kept = config.prior_target == "base"
        yield diffusion.noise_loss(net, asked, latents, given, generator, noise_offset=config.noise_offset, kept=kept)


def in_buckets(buckets: list[torch.Tensor], size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """As `_batches`, each from one bucket: that of the next photo of all, each of which comes once before any comes
    twice. So a bucket has as many batches as it has photos, and after as many batches as there are photos every one was
    taken `size` times.
    """
    if len(buckets) == 1:
        yield from (buckets[0][pick] for pick in _batches(len(buckets[0]), size, generator))
    each = [_batches(len(bucket), size, generator) for bucket in buckets]
    of = torch.arange(len(buckets)).repeat_interleave(torch.tensor([len(bucket) for bucket in buckets]))
    for leader in _batches(len(of), 1, generator):
        number = int(of[leader])
        yield buckets[number][next(each[number])]


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of one batch after another: every photo once before any photo twice."""
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, _shuffled(count, generator)])
        yield left[:size]
        left = left[size:]


def _shuffled(count: int, generator: torch.Generator) -> torch.Tensor:
    """One pass over the photos."""
    return torch.randperm(count, generator=generator)


class Clock:
    """Seconds by phase; each ends when the GPU has done its part of it."""

    def __init__(self, device: torch.device | None = None, began: float | None = None) -> None:
        """began: time.monotonic() of the first phase's beginning; now, where it is not given."""
        self.gpu = device is not None and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic() if began is None else began

    def lap(self, phase: str) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
