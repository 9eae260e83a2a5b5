"""The check of `scripts/bench accept` for a GPU that is really full: a ballast leaves room for half of the wanted
batch, then for less.

Enters: a Desk. Leaves: Found. Errors: Wrong, Skip, Late. How much a site's process needs is measured first, in a
process that does a site's work; the ballast's holder looks at what is free while it takes, so that nothing else on the
GPU has to be known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from benchmarks.gpu.accept_desk import Desk, Skip, Wrong
from benchmarks.gpu.accept_found import Found
from benchmarks.gpu.accept_hub import Deployment
from benchmarks.gpu.accept_runs import GONE, ONE, ended, mini_run, served

APART = 256.0  # MiB, at least, between what two sizes need: else no ballast would tell them apart


def memory(desk: Desk) -> Found:
    """A batch that does not fit is halved; where half does not fit either, the site refuses (SITE-13) and the run ends
    (HUB-02).
    """
    if not desk.world.cuda:
        raise Skip("needs a GPU")
    hub, world = served(desk), desk.world
    config = mini_run(desk, batch_size=world.sizes.memory_batch, local_steps=2, validation_timesteps=1, rounds=1)
    places = {"models": str(world.models), "data": str(world.sites[ONE[0]]), "cache": str(hub.caches[ONE[0]])}
    needs = desk.child("probe", {"config": config, **places})
    tight, tighter = rooms(needs)
    with ballast(desk, hub, tight) as held:
        halved = once_more(desk, hub, config)
    with ballast(desk, hub, tighter) as more:
        refusal = refused(desk, hub, config)
    batch = f"{config['batch-size']} images a pass"
    text = f"{batch} in {tight:.0f} MiB: once more with {halved}, and the run completed; in {tighter:.0f} MiB: SITE-13"
    return Found(text, {"needs MiB": needs, "ballast": [held, more], "refusal": refusal})


def rooms(needs: Mapping[str, float]) -> tuple[float, float]:
    """MiB to leave free of the GPU: for half of the batch and not for the whole one; for an evaluation and not for
    half of the batch.

    What fits is what torch reserved for it, what does not is what it allocated; in the middle between the two. Errors:
    Wrong.
    """
    fits = (needs["half reserved"], needs["evaluate reserved"])
    fits_not = (needs["whole allocated"], needs["half allocated"])
    if any(above - below < APART for below, above in zip(fits, fits_not, strict=True)):
        raise Wrong(
            f"no ballast tells the sizes apart: {', '.join(f'{name} {mib:.0f} MiB' for name, mib in needs.items())}"
        )
    tight, tighter = (needs["context"] + (below + above) / 2 for below, above in zip(fits, fits_not, strict=True))
    return tight, tighter


@contextmanager
def ballast(desk: Desk, hub: Deployment, leave: float) -> Iterator[dict[str, float]]:
    """`leave` MiB of the GPU are free inside, and the rest is held. Leaves: what the holder says of it."""
    # it holds memory that would come on top
    desk.until(lambda: not hub.workers(), GONE, "an earlier run's workers gone")
    holder = desk.begin("ballast", {"leave": leave})
    try:
        if not (line := holder.stdout.readline()):
            desk.answer(holder)
            raise Wrong("the ballast's holder said nothing")
        yield json.loads(line)
    finally:
        desk.over(holder)


def once_more(desk: Desk, hub: Deployment, config: Mapping[str, object]) -> int:
    """A run that completes with halves; the images a pass that its site says it took."""
    before = len(hub.log(ONE[0]))
    run = hub.start_run(config)
    if (state := ended(desk, hub, run)) != "finished:completed":
        raise Wrong(f"with room for half of the batch the run ended {state}: {hub.said(run).get('error')}")
    _, _, said = hub.log(ONE[0])[before:].partition("out of GPU memory; once more with ")
    if not said:
        raise Wrong("the whole batch fitted beside the ballast")
    return int(said.split()[0])


def refused(desk: Desk, hub: Deployment, config: Mapping[str, object]) -> str:
    """The error of a run that its only site refuses for want of memory."""
    run = hub.start_run(config)
    state, error = ended(desk, hub, run), str(hub.said(run).get("error", ""))
    if state != "finished:failed" or not error.startswith("HUB-02") or "SITE-13" not in error:
        raise Wrong(
            f"with room for less than half of the batch the run ended {state}: {error or hub.history(run).get('state')}"
        )
    return error
