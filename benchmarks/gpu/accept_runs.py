"""Checks of `scripts/bench accept` that run the app on a real hub with one or two sites, all on the same GPU.

Enters: a Desk. Leaves: Found. Errors: Wrong, Skip, Late. What a run did is read from its history on the shared volume,
which a person would read too; who worked on it, from the processes in the site's session.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from app.site import gpu
from benchmarks.gpu.accept_desk import Desk, Late, Wrong
from benchmarks.gpu.accept_found import Found, Target
from benchmarks.gpu.accept_hub import Deployment
from benchmarks.gpu.accept_machine import ADAPTER
from benchmarks.gpu.accept_world import BOTH, ONE
from benchmarks.speed.contenders import phases
from benchmarks.speed.watch import Watch

MIB = 2**20
SLACK = 256 * MIB  # of the GPU, that may differ between two idle looks
ROUND = 1.25  # a steady round at most this many floors
KILLED = 100.0  # seconds in which a round must have gone on after its worker died
GONE = 30.0  # seconds after a run in which its worker must have ended
AT_WORK = "usable .png"  # in the site's log, once for each message that it takes up
Told = dict[str, Any]


def served(desk: Desk, names: Sequence[str] = ONE, base: bool = False) -> Deployment:
    """The hub with these sites online, and nothing left of an earlier run."""
    world = desk.world
    for thing in ("photos", *(["base"] if base else [])):
        world.have(thing, desk)
    hub = world.have("hub", desk)
    hub.serve(names, desk)
    return hub


def mini_run(desk: Desk, **more: Any) -> Told:
    """The run config of a small run on models/mini."""
    sizes = desk.world.sizes
    return {
        "base-model": "mini", "resolution": sizes.mini_resolution, "batch-size": sizes.mini_batch,
        "local-steps": sizes.mini_steps, "rounds": 1, "min-sites": 1, "wait-for-sites": 60, "round-timeout": 120,
        "round-retries": 0, "sample-prompts": "", "validation-timesteps": 2,
    } | {key.replace("_", "-"): value for key, value in more.items()}  # fmt: skip


def ended(desk: Desk, hub: Deployment, run: str) -> str:
    """The state in which a run ended."""
    return desk.until(
        lambda: state if (state := hub.state(run)).startswith("finished") else "", desk.left(), f"run {run}'s end", 0.4
    )


def went_well(desk: Desk, hub: Deployment, config: Mapping[str, object]) -> tuple[str, Told]:
    """(id, history) of a run that completed. Errors: Wrong where it ended otherwise."""
    run = hub.start_run(config)
    if (state := ended(desk, hub, run)) != "finished:completed":
        raise Wrong(f"the run ended {state}: {hub.said(run).get('error', 'and left no reason')}")
    return run, hub.history(run)


# --- mini
# ----------------------------------------------------------------------------------------------------------------


def mini(desk: Desk) -> Found:
    """Two sites on the same GPU, three short rounds: they learn, and the history says what it cost on the GPU."""
    hub = served(desk, BOTH)
    _, told = went_well(desk, hub, mini_run(desk, rounds=3, min_sites=2))
    losses = [entry["weighted"] for entry in told["validation"]]
    if losses[-1] >= losses[0]:
        raise Wrong(f"the validation loss did not fall: {losses}")
    if unsaid := unmetered(told, desk.world.gpu_says()) if desk.world.cuda else []:
        raise Wrong(f"the history lacks {', '.join(unsaid)}")
    seconds = [entry["seconds"] for entry in told["rounds"]]
    name = told["rounds"][-1]["sites"][BOTH[0]]["gpu"]
    after = f"{statistics.mean(seconds[1:]):.1f} s a round after the first ({seconds[0]:.1f} s)"
    if joules := [metrics["gpu-joules"] for metrics in told["rounds"][-1]["sites"].values() if "gpu-joules" in metrics]:
        after += f", {sum(joules):.0f} J in the last"
    facts = {"losses": losses, "seconds": seconds, "rounds": [entry["sites"] for entry in told["rounds"]]}
    return Found(f"two sites on {name}, 3 rounds: loss {losses[0]:.4f} -> {losses[-1]:.4f}; {after}", facts)


def unmetered(history: Told, wanted: set[str]) -> list[str]:
    """What the history does not say of a site's GPU in a round: its name, and the wanted figures."""
    sites = [(entry["round"], name, metrics) for entry in history["rounds"] for name, metrics in entry["sites"].items()]
    unnamed = [
        f"round {number} {name}: a GPU's name"
        for number, name, told in sites
        if told.get("gpu", gpu.NO_GPU) == gpu.NO_GPU
    ]
    return unnamed + [
        f"round {number} {name}: {key}" for number, name, told in sites for key in sorted(wanted) if key not in told
    ]


# --- Stable Diffusion 1.5's sizes
# ------------------------------------------------------------------------------------------


def sd15(desk: Desk) -> Found:
    """A steady round of one site beside its floor: the same evaluation and steps in a warm process, same photos."""
    hub, world, sizes = served(desk, base=True), desk.world, desk.world.sizes
    config = {
        "base-model": "bench", "resolution": sizes.sd15_resolution, "batch-size": sizes.sd15_batch,
        "local-steps": sizes.sd15_steps, "rounds": 3, "learning-rate": 0.0001, "validation-fraction": 0.2,
        "validation-timesteps": 4, "min-sites": 1, "wait-for-sites": 60, "round-timeout": 200, "round-retries": 0,
        "sample-prompts": "",
    } | ADAPTER  # fmt: skip
    _, told = went_well(desk, hub, config)
    desk.until(lambda: not hub.workers(), GONE, "the run's worker gone")
    asked = {
        "config": config,
        "device": world.device,
        "rounds": 2,
        "models": str(world.models),
        "data": str(world.sites[ONE[0]]),
    }
    alone = desk.child("floor", asked | {"cache": str(hub.caches[ONE[0]])})["rounds"]
    return beside(told["rounds"], alone, sizes.sd15_steps * sizes.sd15_batch)


def beside(rounds: list[Told], alone: list[dict[str, float]], images: int) -> Found:
    """A run's rounds of `images` images beside its floor's; the first round of each does not count."""
    first, *after = [by_phase(entry, ONE[0]) for entry in rounds]
    ours, floor = steady(after), steady([entry | {"round": sum(entry.values())} for entry in alone])
    facts = {"rounds": rounds, "first": first, "steady": ours, "floor": floor}
    facts |= {"images/s": images / ours["train"], "floor's images/s": images / floor["train"]}
    shown = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in ours.items() if phase != "round")
    text = (
        f"a steady round {ours['round']:.2f} s ({shown}), the first {first['round']:.1f}; floor {floor['round']:.2f} s"
    )
    target = Target("round / floor", ours["round"] / floor["round"], most=ROUND)
    return Found(f"{text}; {facts['images/s']:.1f} images/s", facts, [target])


def by_phase(entry: Told, site: str) -> dict[str, float]:
    """A round's seconds by the site's phases; `wait` is what they leave, `round` all of it."""
    worked = phases(entry["sites"][site])
    return worked | {"wait": max(0.0, entry["seconds"] - sum(worked.values())), "round": entry["seconds"]}


def steady(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median seconds by phase."""
    names = list(dict.fromkeys(name for entry in rounds for name in entry))
    return {name: statistics.median(entry.get(name, 0.0) for entry in rounds) for name in names}


# --- runs that go on, or follow one another
# --------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two runs one after another: their ids, the last one's history, and what of each was seen at the site.

    workers: ids of the processes that took its messages; left: those of them that were still there 30 s after it;
    before, after: bytes of the GPU in use, None where nobody can say.
    """

    before: int | None
    runs: list[str] = field(default_factory=list)
    told: Told = field(default_factory=dict)
    workers: list[set[int]] = field(default_factory=list)
    left: list[set[int]] = field(default_factory=list)
    after: int | None = None


def pair(desk: Desk) -> Pair:
    """Two rounds, then two more of the same run. Errors: Wrong where a run does not complete."""
    hub = served(desk)
    seen = Pair(desk.world.gpu_used())
    for config in ({"rounds": 2}, {"rounds": 4, "resume": "latest"}):
        watch = Watch({hub.running[ONE[0]].pid: ONE[0]})
        watch.start()
        try:
            run, seen.told = went_well(desk, hub, mini_run(desk, **config))
        finally:
            watch.stop()
        seen.runs.append(run)
        seen.workers.append(set(watch.began.get(ONE[0], {})))
        with suppress(Late):
            desk.until(lambda: not hub.workers(), GONE, "the run's worker gone")
        seen.left.append(hub.workers())
    seen.after = settled(desk, seen.before)
    desk.world.seen = seen
    return seen


def settled(desk: Desk, before: int | None) -> int | None:
    """Bytes of the GPU in use, as soon as they are back at `before`, and 10 s later at the latest."""
    end = time.monotonic() + 10
    while (
        (after := desk.world.gpu_used()) is not None
        and before is not None
        and after > before + SLACK
        and time.monotonic() < end
    ):
        time.sleep(0.2)
    return after


def resume(desk: Desk) -> Found:
    """One history of four rounds, each from the adapter of the one before, though the run was over after the second."""
    seen = pair(desk)
    if (source := seen.told.get("resumed", {}).get("run")) != seen.runs[0]:
        raise Wrong(f"it went on from {source or 'nothing'}, and not from {seen.runs[0]}")
    if torn := breaks(seen.told["rounds"], 4):
        raise Wrong("; ".join(torn))
    adapters = [entry["adapter"] for entry in seen.told["rounds"]]
    return Found(
        "rounds 1, 2 | 3, 4 in one history, each from the adapter of the one before",
        {"runs": seen.runs, "adapters": adapters},
    )


def breaks(rounds: list[Told], wanted: int) -> list[str]:
    """Where a history is not a chain of `wanted` rounds."""
    numbers = [entry["round"] for entry in rounds]
    torn = [] if numbers == list(range(1, wanted + 1)) else [f"the history has rounds {numbers}"]
    links = [(a, b) for a, b in zip(rounds, rounds[1:], strict=False) if b["started_from"] != a["adapter"]]
    return torn + [f"round {b['round']} did not start from round {a['round']}'s adapter" for a, b in links]


def again(desk: Desk) -> Found:
    """Each of two runs has a worker of its own, which is gone when it is over, with all that it held of the GPU
    (`resume`'s two runs).
    """
    return judged(desk.world.seen or pair(desk))


def judged(seen: Pair) -> Found:
    if not all(len(ids) == 1 for ids in seen.workers) or seen.workers[0] == seen.workers[1]:
        raise Wrong(f"not one worker a run and another one for the second: {[sorted(ids) for ids in seen.workers]}")
    if any(seen.left):
        raise Wrong(f"still there {GONE:.0f} s after its run: {[sorted(ids) for ids in seen.left]}")
    text = "one worker a run, another one for the second, gone after each"
    facts: Told = {"runs": seen.runs, "workers": [sorted(ids) for ids in seen.workers]}
    if seen.before is None or seen.after is None:
        return Found(text, facts)
    if seen.after > seen.before + SLACK:
        raise Wrong(f"{(seen.after - seen.before) / MIB:.0f} MiB of the GPU are still held after the runs")
    facts |= {"before MiB": seen.before / MIB, "after MiB": seen.after / MIB}
    return Found(f"{text}; GPU memory {seen.before / MIB:.0f} MiB before, {seen.after / MIB:.0f} after", facts)


# --- a worker that dies
# ----------------------------------------------------------------------------------------------------


def in_training(desk: Desk, hub: Deployment, run: str, number: int) -> None:
    """Wait until the site trains in that round: it says what photos it has, evaluates, and trains."""

    def waiting() -> bool:
        if (said := hub.said(run)).get("error"):
            raise Wrong(f"the run ended before round {number}: {said['error']}")
        return (said.get("round"), said.get("state")) == (number, "waiting")

    heard = hub.log(ONE[0]).count(AT_WORK)
    desk.until(waiting, desk.left(), f"round {number}", 0.02)
    desk.until(
        lambda: hub.log(ONE[0]).count(AT_WORK) == heard + number,
        desk.left(),
        f"{ONE[0]} at work in round {number}",
        0.02,
    )
    time.sleep(0.5)


def killed(desk: Desk) -> Found:
    """SIGKILL for the site's worker in the middle of a round's training: the hub tries the round again, and the run
    completes.

    Nobody answers for the dead process before Flower has missed two of its heartbeats, 60 s; the deadline of the round
    lies behind that.
    """
    hub = served(desk)
    deadline = {
        "round-timeout": int(KILLED) - 5,
        "round-patience": 0.0,
        "round-retries": 2,
        "local-steps": desk.world.sizes.long_steps,
    }
    run = hub.start_run(mini_run(desk, rounds=2) | deadline)
    in_training(desk, hub, run, 2)
    died, victims, heard = time.monotonic(), hub.workers(), hub.log(ONE[0]).count(AT_WORK)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    if len(victims) != 1:
        raise Wrong(f"{len(victims)} workers in the middle of a round")
    goes_on = lambda: hub.log(ONE[0]).count(AT_WORK) > heard or hub.state(run).startswith("finished")  # noqa: E731
    desk.until(goes_on, KILLED + 10, "the site at work again", 0.3)
    took = time.monotonic() - died
    if (state := ended(desk, hub, run)) != "finished:completed":
        raise Wrong(f"the run ended {state}: {hub.said(run).get('error', 'and left no reason')}")
    refused = hub.history(run)["rounds"][1]["refused"]
    if not refused:
        raise Wrong("the worker had done its round before it died: nothing was shown")
    if took > KILLED * desk.world.patience:
        raise Wrong(f"the site was at work again after {took:.0f} s, and not within {KILLED:.0f}")
    reason = refused[0]["reason"].split("  ")[0]
    facts = {"seconds": took, "refused": refused, "victims": sorted(victims)}
    return Found(f"the site was at work on the round again after {took:.1f} s ({reason}), and the run completed", facts)
