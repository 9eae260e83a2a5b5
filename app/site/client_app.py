"""The ClientApp: translates Flower's records to a site's work and back; one message a round.

`train` evaluates what arrived, trains and replies with the adapter; `evaluate` (after the last round) only evaluates.
`query` gets ready for a round whose hub sees no site's adapter (secrecy.py), and replies with a key for it.
Where one process takes all messages of a run (BOUQUET_KEEP, set by superexec.py), the base model stays on the device
and the encoded photos in memory from a round to the next. Nothing that a round has learned does: the adapter that
arrives replaces all of it. What may leave: the adapter, numbers, the site's and its GPU's name, an error's public
sentence. Nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from app import bundle, quiet
from app.config import RunConfig
from app.errors import BouquetError, SiteError, public
from app.site import budget, consent, journal, limits
from app.site.privacy import Secret

if TYPE_CHECKING:
    from app.site.train import Site


class MadeFrom(NamedTuple):
    """All that a site is made from; with another one it is made anew."""

    run: int
    config: RunConfig
    models: Path
    folder: Path
    cached: Path
    limits: str
    secret: Secret
    promise: budget.Promise | None


quiet.flower()
app = ClientApp()
kept: dict[MadeFrom, Site] = {}  # at most one: the site that took the last round
KEYS = ("site-name", "data-path", "models-path", "cache-path")  # of a SuperNode's node config
FOLDERS = ("BOUQUET_DATA", "BOUQUET_MODELS", "BOUQUET_CACHE")  # of a simulation's environment
ERROR = 100  # our error code in Flower's replies; the reason has our own code


def guarded(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """A named error becomes an error reply with its public sentence; any other leaves as its type alone."""

    def run(message: Message, context: Context) -> Message:
        try:
            return Message(work(message, context), reply_to=message)
        except BouquetError as error:
            print(error.report(), flush=True)
            reason = str(error)
        except Exception as error:
            traceback.print_exc()
            reason = public("SITE-99", kind=type(error).__name__)
        note_refusal(context, reason.split()[0])
        return Message(Error(code=ERROR, reason=reason), reply_to=message)

    return run


@app.train()
@guarded
def train(message: Message, context: Context) -> RecordDict:
    return take_part(message, context, training=True)


@app.evaluate()
@guarded
def evaluate(message: Message, context: Context) -> RecordDict:
    return take_part(message, context, training=False)


def note_refusal(context: Context, code: str) -> None:
    """A line of the journal for a message that got an error; one that waits for consent is asked again and again."""
    if code == "TRUST-11":
        return
    with contextlib.suppress(SiteError):  # nobody has said where the journal is
        journal.deed(places(context)[3], "refused", run=str(context.run_id), code=code)


def ask_operator(message: Message, context: Context) -> budget.Promise | None:
    """A run goes on here only with the operator's consent, where the site asks for it. Errors: TRUST-11, TRUST-12,
    TRUST-03 and -04 before: what the site does not allow is nothing to decide on. Returns what the site has promised.
    """
    config, own = RunConfig.read(context.run_config), str(context.node_config.get("limits", ""))
    limits.Limits.read(own).check(config)
    cached = places(context)[3]
    budget.check(config, promise := budget.of(os.environ, cached))
    if (how := consent.mode(os.environ)) != "always":
        base = str(message.content.config_records["config"]["base-fingerprint"])
        privacy = budget.outlook(cached, promise, config) if promise else ""
        asks = consent.asked(cached, str(context.run_id), config, bundle.digest(), base, own, privacy)
        consent.obtain(cached, how, asks)
    return promise


@app.query()
@guarded
def offer(message: Message, context: Context) -> RecordDict:
    """The first half of a round with masks; what can go wrong before training does so before anybody relies on it."""
    promise = ask_operator(message, context)
    from app.site import secrecy  # with what it imports, once there is work

    asked = read(message, context, promise)
    run, config, cached = str(context.run_id), asked.made_from.config, asked.made_from.cached
    own = secrecy.Own.read(context.node_config, asked.name, cached)
    site = take_up(asked.made_from, asked.base)
    site.limits.check_budget(config, run, journal.read(cached))
    if asked.made_from.promise and site.terms:
        budget.check_room(cached, asked.made_from.promise, site.terms, config, run, asked.number)
    said = own.offer(config, site.told, run, asked.number, asked.attempt)
    if os.environ.get("BOUQUET_KEEP"):
        kept[asked.made_from] = site
    return RecordDict({"info": ConfigRecord({"offer": said})})


class Asked(NamedTuple):
    """A message, read."""

    name: str
    number: int
    attempt: int
    base: str  # the hub's fingerprint of it
    made_from: MadeFrom


def read(message: Message, context: Context, promise: budget.Promise | None, *, training: bool = True) -> Asked:
    """What the hub asks for, as far as the site allows it. Errors: TRUST-03, TRUST-04, SITE-12, CONFIG-..."""
    quiet.libraries()
    config, order = RunConfig.read(context.run_config), message.content.config_records["config"]
    own = str(context.node_config.get("limits", ""))
    if limits.wants_checkpointing(os.environ):
        config = replace(config, gradient_checkpointing=True)
    name, folder, models, cached, secret = places(context)
    made_from = MadeFrom(context.run_id, config, models, folder, cached, own, secret, promise)
    number, attempt = int(str(order["round"])), int(str(order.get("attempt", 0)))
    limits.check_turn(config, number, attempt, training=training)
    return Asked(name, number, attempt, str(order["base-fingerprint"]), made_from)


def take_part(message: Message, context: Context, *, training: bool) -> RecordDict:
    """Apply the global adapter strictly, evaluate it, train from it when asked to."""
    promise = ask_operator(message, context)
    from app import lora, model, wire  # torch is imported only once there is work
    from app.site import gpu, secrecy

    name, number, attempt, base, made_from = read(message, context, promise, training=training)
    config, cached = made_from.config, made_from.cached
    reply, sent = RecordDict(), None
    with gpu.Meter() as meter:
        site = take_up(made_from, base)
        site.limits.check_budget(config, str(context.run_id), journal.read(cached))
        print(f"bouquet: {name}: {site.privacy} {site.partition.report()}", flush=True)
        arrived = wire.unpack(message.content.array_records["arrays"], config.wire_precision)
        applied = model.apply_adapter(site.net, arrived)
        info: dict[str, str | int] = {"site": name, "applied": applied}
        metrics: dict[str, int | float] = {"num-examples": len(site.photos), "train-loss": 0.0}
        if not promise:  # else nobody is told
            metrics["validation-loss"] = site.evaluate()
        if training:
            pact = None
            if config.secrecy == "masks":
                own = secrecy.Own.read(context.node_config, name, cached)
                given = message.content.config_records["config"].get("offers")
                offers = [str(each) for each in given] if isinstance(given, list) else []
                pact = own.agree(config, offers, str(context.run_id), number, attempt, applied)
            if promise and (terms := site.terms):
                budget.spend(cached, promise, terms, config, str(context.run_id), number)
                metrics["train-loss"] = site.fit_privately(terms, number)
            else:
                metrics["train-loss"] = site.fit(site.privacy.seed(config.seed, name, number), number)
            sent = wire.rounded(model.adapter_of(site.net), config.wire_precision)
            half, rank = lora.half(config, number), site.limits.lowered(config)
            part = lora.part(sent, half, rank)  # the rest of it is as it arrived, and stays here
            info |= {"rank": rank} if rank else {}
            if pact:
                part = sent = pact.hide(lora.part(arrived, half), part)
            reply["arrays"] = wire.pack(part, config.wire_precision)
    metrics |= meter.numbers()
    metrics |= {f"seconds-{phase}": seconds for phase, seconds in site.clock.seconds.items()}
    metrics |= {f"photos-{reason}": count for reason, count in site.partition.counts.items() if reason != "images"}
    if not site.privacy.private:  # the run's trigger word and resolution would be questions about single photos
        metrics |= {"captions-cut": site.partition.cut} if site.partition.cut else {}
        metrics |= {"enlarged": site.partition.enlarged} if site.partition.enlarged else {}
    terms = site.terms  # with such, nothing else leaves that follows from a photo, were it the seconds that it took
    leaves = budget.told(cached, promise, terms) if promise and terms else site.privacy.told(metrics)
    reply["metrics"] = MetricRecord({**leaves})
    reply["info"] = ConfigRecord({**info, "gpu": meter.name})
    told = {"run": str(context.run_id), "round": number, "images": metrics["num-examples"], "applied": applied}
    told |= {"enlarged": site.partition.enlarged} if site.partition.enlarged else {}
    journal.note(cached, sent, **told, sent=model.adapter_hash(sent) if sent else "")
    if training and os.environ.get("BOUQUET_KEEP"):
        kept[made_from] = site
    validation = "is told to nobody" if promise else f"{metrics['validation-loss']:.4f}"
    print(f"bouquet: {name}: round {number}  validation {validation}  train {metrics['train-loss']:.4f}", flush=True)
    return reply


def take_up(made_from: MadeFrom, base_fingerprint: str) -> Site:
    """The site of the round before when all that it was made from is the same, else a new one; a message that fails
    keeps none.
    """
    from app.site import train

    began = float(os.environ.get("BOUQUET_BEGAN") or time.monotonic())
    site = kept.pop(made_from, None)
    kept.clear()
    if site is None:
        own = limits.Limits.read(made_from.limits)
        config, models, folder, cached = made_from.config, made_from.models, made_from.folder, made_from.cached
        return train.Site(
            config, models, folder, cached, base_fingerprint, began,
            limits=own, secret=made_from.secret, promise=made_from.promise,
        )  # fmt: skip
    site.get_ready(base_fingerprint, began)
    return site


def places(context: Context) -> tuple[str, Path, Path, Path, Secret]:
    """(site name, data folder, base models, cache, the site's secret): the site's own choice, never the run's.

    In deployment they are the SuperNode's node config; in simulation the environment's, by partition-id.
    """
    own = context.node_config
    if all(key in own for key in KEYS):
        name, data, models, cached = (str(own[key]) for key in KEYS)
        return name, Path(data), Path(models), Path(cached), Secret.MADE
    if "partition-id" in own and all(name in os.environ for name in FOLDERS):
        name = f"site-{int(own['partition-id']) + 1}"
        data, models, cached = (os.environ[folder] for folder in FOLDERS)
        return name, Path(data, name), Path(models), Path(cached, name), Secret.NONE
    raise SiteError(
        "SITE-12",
        found=f"node config has {', '.join(sorted(own)) or 'nothing'}",
        fix=(
            'start the SuperNode with --node-config \'site-name="…" data-path="…" models-path="…" cache-path="…"\', '
            "or set BOUQUET_DATA, BOUQUET_MODELS and BOUQUET_CACHE for a simulation"
        ),
    )
