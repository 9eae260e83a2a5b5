"""A round tried out before there is one: what memory it will take, and a training step on this site's own photos.

Enters: a run's configuration, the base model's folder, the site's photos. Leaves: an estimate; seconds a step and the
peak of memory, in words. Errors: those of training, torch.OutOfMemoryError.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from app import families, model, quiet
from app.config import RunConfig
from app.site import cache, train
from app.site.photos import data, views
from bouquet.site import estimate
from bouquet.site.estimate import Estimate

TIMED = 3  # optimiser steps, after a first one,
PATIENCE = 60  # unless they would take longer than this many seconds
GIB = 2**30


def estimated(config: RunConfig, base: Path, on_gpu: bool, photos: int) -> Estimate:
    """What a round takes as train.py and cache.py go about it."""
    return estimate.estimate(
        base,
        config,
        half=train.halved(train.accelerator(config)),
        on_gpu=on_gpu,
        evaluated=min(train.WIDER * config.batch_size, photos * config.validation_timesteps),
        encoded=cache.a_pass(math.prod(views.largest(config, families.of(base).multiple))),
        photos=photos,
    )


def step(config: RunConfig, base: Path, partition: data.Partition, cached: Path) -> str:
    """On photos encoded afresh in a folder of its own: the site's cache stays as it is."""
    some = replace(partition, photos=partition.photos[: max(2, config.batch_size)], quarantined=())
    accelerator, cuda = train.accelerator(config), torch.cuda.is_available()
    quiet.libraries()
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=cached, prefix="preflight-") as folder:
        sums = model.fingerprint(base, cached)
        plan = views.Plan((views.largest(config, families.of(base).multiple),))  # what takes the most memory
        some, rows = cache.encode(some, base, sums, plan, Path(folder), accelerator.device)
        encoded = rows(some.photos)  # a pass of class images costs what one of photos does
    objective, net = train.load(base, config, accelerator)

    def seconds(steps: int) -> float:
        """A step's, as a mean."""
        start = time.monotonic()
        classes = encoded if config.prior_loss_weight else None
        train.fit(net, objective, encoded, replace(config, local_steps=steps), accelerator, steps, 1, classes)
        return (time.monotonic() - start) / steps

    took = seconds(1)
    if took * TIMED < PATIENCE:  # the first step has things to set up
        took = seconds(TIMED)
    peak = torch.cuda.max_memory_allocated() if cuda else estimate.page_peak()
    return (
        f"{took:.2f} s a step on the {'GPU' if cuda else 'CPU'}, {config.batch_size} images each; peak memory"
        f" {peak / GIB:.2f} GiB"
    )
