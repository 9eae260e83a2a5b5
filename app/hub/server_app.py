"""The ServerApp: rounds over Flower's Grid, aggregation, and everything a person reads about the run.

Enters: the run's config, and from the environment two folders, BOUQUET_MODELS and BOUQUET_ADAPTERS (the shared
volume), and HUB_DEVICE, on which sample pictures are drawn.
Leaves: `<adapters>/<run id>/` (see volume.py), one plain line a round on stdout, and a run that ends completed or,
when it cannot go on, failed with a public sentence.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from app import audit, bases, bundle, families, lora, metrics, model, quiet, records, text, wire
from app.adapter import formats, lora_files, sample, store
from app.config import RunConfig
from app.errors import BouquetError, HubError
from app.hub import ema, guard, history, products, tracking, volume
from app.hub.exchange import Exchange
from app.hub.gallery import Gallery
from app.hub.history import Base, Begun, Given, History, Part, Provenance, Resumed, Round, Spent
from app.hub.strategy import Strategy
from app.hub.sums import Sums


class _Named(logging.Filter):
    """A named error ends the ServerApp with its report, which `main` prints; a hundred lines of traceback hid that."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], BouquetError):
            record.exc_info = None
        return True


logging.getLogger("flwr").addFilter(_Named())
quiet.flower()
text.tidy_log("flwr")  # Flower's own lines about a site's reply, and the traceback of a run that failed
app = ServerApp()
AUDIT = "audit.jsonl"  # beside the runs
WITHHELD = "is told by no site"  # a loss, where all sites have differential privacy
# a run that goes on cannot change these
SAME = ("base_model", "lora_rank", "lora_alpha", "lora_scaling", "rank_pattern", "lora_targets", "strategy")


@app.main()
def main(grid: Grid, context: Context) -> None:
    try:
        Run(grid, context).go()
    except BouquetError as error:
        print(f"bouquet: failed\n{error.report()}", flush=True)
        raise


class Run:
    """One run: its config, its folder, its history."""

    def __init__(self, grid: Grid, context: Context) -> None:
        self.config = RunConfig.read(context.run_config)
        quiet.libraries()
        adapters, models = (_folder(name) for name in ("BOUQUET_ADAPTERS", "BOUQUET_MODELS"))
        self.folder = adapters / str(context.run_id)
        self.base = bases.locate(self.config.base_model, models)
        self.family = families.of(self.base)
        self.family.check_run(self.config)
        model.check(self.base)
        self.device = sample.device(os.environ.get("HUB_DEVICE", ""))
        fingerprint = model.fingerprint(self.base)["base"]
        base = Base(self.config.base_model, fingerprint)
        self.history = History(str(context.run_id), "running", asdict(self.config), base, formats.versions())
        admitted, self.bounds = _admitted()
        exchange = Sums if self.config.secrecy == "masks" else Exchange
        self.exchange = exchange(grid, self.config, fingerprint, self.folder, admitted, self.bounds)
        self.began = time.time()
        self.tracker = tracking.start(self.config, self.folder)

    def go(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()
        self.deed("run started", base=self.exchange.base, config=hash_of(self.history.config), bundle=own_bundle())
        self.gallery = Gallery(self.base, self.config, self.folder, self.tracker.pictures, self.device)
        try:
            adapter = self.rounds()
            final = formats.write_final(self.folder, adapter, self.config, self.family, self.provenance(adapter))
            self.deed("exported", adapter=model.adapter_hash(adapter))
            self.gallery.finish()
            self.history = replace(self.history, state="finished")
        except BaseException as error:
            reason = str(error) if isinstance(error, BouquetError) else type(error).__name__
            self.history = replace(self.history, state="failed", error=reason)
            self.exchange.note(error=reason)
            raise
        finally:
            self.exchange.spool.clear()
            self.gallery.close()
            self.tracker.close()
            self.exchange.note(state=self.history.state)
            self.deed("run ended", state=self.history.state, code=self.history.error.split(" ")[0])
            try:
                self.save()
            except HubError as error:  # the history of the last round stays, and so does the reason above
                print(f"bouquet: {error.found}", flush=True)
        volume.point_latest(self.folder)
        print(f"bouquet: finished  adapter {final}  seconds {time.time() - self.began:.0f}", flush=True)

    def rounds(self) -> model.Adapter:
        """Every round from the first, or from where another run stopped; then one evaluation of what is left: the last
        aggregate, or the average of all.
        """
        self.exchange.check_chosen()
        done, adapter, state = self.start()
        adapter = wire.rounded(adapter, self.config.wire_precision)
        strategy, self.average = Strategy(self.config, state), ema.Average(self.config.ema_decay, state)
        for number in range(done + 1, self.config.rounds + 1):
            adapter = self.round(number, adapter, strategy)
        result = wire.rounded(self.average.result(adapter), self.config.wire_precision)
        self.last_evaluation(result)
        return result

    def start(self) -> tuple[int, model.Adapter, dict[str, Tensor]]:
        """(rounds already done, global adapter, server state): a fresh adapter, or what `start-from` or `resume` names.

        Errors: HUB-08, and for `start-from` EXPORT-03, ADAPTER-01.
        """
        fresh = model.new_adapter(self.base, self.config)
        if self.config.start_from:
            read = formats.read_lora(self.folder.parent / self.config.start_from, self.family, self.base)
            scales = lora.scales(fresh, self.config)
            adapter, layers = lora_files.begun(read.adapter, fresh, scales), len(read.adapter) // 2
            model.check_adapter(adapter, fresh)
            taken = f"{layers} of {len(fresh) // 2} layers, up to rank {read.rank}; the rest anew"
            print(f"bouquet: starting from {self.config.start_from}  {taken}", flush=True)
            begun = Begun(self.config.start_from, model.adapter_hash(adapter))
            self.history = replace(self.history, started_from=begun)
            return 0, adapter, {}
        if not self.config.resume:
            return 0, fresh, {}
        source = volume.find_run(self.folder.parent, self.config.resume)
        done = volume.written_rounds(source)[-1]
        earlier = history.read(source / history.FILE)
        usual = RunConfig()  # what a run of an older version did, which could not say it
        now, then = (
            {name: run.config.get(name, getattr(usual, name)) for name in SAME} for run in (self.history, earlier)
        )
        same_base = self.is_same_base(earlier.base)
        if now != then or not same_base:
            changed = [name.replace("_", "-") for name in SAME if now[name] != then[name]]
            other = changed or ["the base model's fingerprint"]
            raise HubError(
                "HUB-08",
                why=f"it had another {', '.join(other)}",
                found=f"{source.name} had {then}, this run has {now}",
                fix="give the values of that run, or leave resume out to start anew",
            )
        if self.config.rounds < done:
            raise HubError(
                "HUB-08",
                why=f"it has trained {done} rounds, and this one is to have {self.config.rounds}",
                found=f"{source.name} has round {done} on the volume; rounds = {self.config.rounds}",
                fix=f"give rounds={done} or more, and the rest of that run's configuration",
            )
        volume.take_over(source, self.folder)
        rounds, validation = history.up_to(done, earlier, volume.told_rounds(source))
        self.history = replace(self.history, resumed=Resumed(source.name, done), rounds=rounds, validation=validation)
        self.save()
        print(f"bouquet: going on after round {done} of run {source.name}", flush=True)
        if other := _others(self.history.config, earlier.config):
            print(f"bouquet: from here on with {', '.join(other)}", flush=True)
        for number in volume.written_rounds(self.folder):
            self.gallery.draw(number, store.read_adapter(self.folder / f"round-{number:04d}"))
        folder = self.folder / f"round-{done:04d}"
        adapter = store.read_adapter(folder)
        model.check_adapter(adapter, fresh)
        return done, adapter, volume.read_state(folder)

    def is_same_base(self, other: Base | None) -> bool:
        """Whether a run on that base model can go on here."""
        here = self.history.base
        if here is None or other is None or here.name != other.name:
            return False
        return model.is_base(self.base, here.fingerprint, other.fingerprint)

    def last_evaluation(self, adapter: model.Adapter) -> None:
        """What the sites say of the result. The training is done: a site that is gone by now spoils nothing."""
        try:
            replies, refused = self.exchange.last(self.config.rounds + 1, adapter)
        except HubError as error:
            self.history = replace(self.history, no_final_evaluation=str(error))
            print(f"bouquet: no final evaluation\n{error.report()}", flush=True)
            return
        self.history = replace(self.history, refused_final_evaluation=tuple(refused))
        self.note_validation(self.config.rounds, {r.site: said_of(r) for r in self.weigh(replies)})
        losses = [entry.weighted for entry in self.history.validation]
        numbers = f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else WITHHELD
        print(f"bouquet: validation {numbers} over {self.config.rounds} rounds", flush=True)

    def round(self, number: int, adapter: model.Adapter, strategy: Strategy) -> model.Adapter:
        """Send the global adapter, take the sites' adapters, aggregate, write the round."""
        start = time.time()
        volume.check_room(self.folder, adapter, self.config.min_sites)
        replies, refused = self.exchange.round(number, adapter)
        weighed = self.weigh(replies)
        new = strategy.aggregate(number, self.exchange.summed or weighed, adapter)
        new = wire.rounded(new, self.config.wire_precision)
        model.check_adapter(new, adapter)
        self.average.take(new)
        sites = {r.site: said_of(r) for r in weighed}
        self.note_validation(number - 1, sites)
        entry = Round(
            round=number,
            started_from=model.adapter_hash(adapter),
            adapter=model.adapter_hash(new),
            train_loss=history.weighted(sites, "train-loss"),
            seconds=round(time.time() - start, 2),
            sites=sites,
            adapters={r.site: model.adapter_hash(r.trained) for r in weighed},
            refused=tuple(refused),
            average=model.adapter_hash(self.average.held) if self.config.ema_decay else "",
            undecided=tuple(sorted(self.exchange.undecided)),
            declined=tuple(sorted(self.exchange.declined)),
            aggregation_error=None if self.exchange.summed else products.lost(weighed, adapter, self.config),
        )
        self.history = replace(self.history, rounds=(*self.history.rounds, entry))
        state = strategy.state() | self.average.state()
        volume.write_round(self.folder, number, new, self.config, self.family, records.told(entry), state)
        self.exchange.spool.clear()
        self.save()
        self.deed("round", round=number, started_from=entry.started_from, adapter=entry.adapter)
        self.exchange.note(state="working", adapter=f"round-{number:04d}")
        self.tracker.round(entry)
        self.gallery.draw(number, new)
        self.gallery.tell()
        now = self.history.validation[-1:]
        losses = [entry.train_loss, now[0].weighted if now and now[0].after_round == number - 1 else None]
        train, validation = (WITHHELD if loss is None else f"{loss:.4f}" for loss in losses)
        pace = (time.time() - self.began) / (number - (self.history.resumed.after_round if self.history.resumed else 0))
        print(
            f"bouquet: round {number}/{self.config.rounds}  train {train}  validation {validation}"
            f"  sites {len(replies)}  images"
            f" {sum(r.images for r in weighed)}  {entry.seconds:.0f} s  ETA"
            f" {pace * (self.config.rounds - number):.0f} s",
            flush=True,
        )
        return new

    def weigh(self, replies: list[guard.Reply]) -> list[guard.Reply]:
        """The replies with the images they count for; says where those are fewer than a site says that it has."""
        weighed = guard.weigh(replies, self.bounds, self.config.largest_share)
        for r in weighed:
            if r.bound:
                said = metrics.bounded(r.site, r.metrics["num-examples"], r.images, r.bound)
                self.exchange.say(f"bouquet: bounded  {said}")
        return weighed

    def note_validation(self, after: int, sites: Mapping[str, Part]) -> None:
        """The arriving adapter's loss, after so many rounds, at each site that tells it."""
        if told := history.arrived(after, sites):
            self.history = replace(self.history, validation=(*self.history.validation, told))
            self.tracker.validation(told)

    def provenance(self, adapter: model.Adapter) -> Provenance:
        last = {site: part for entry in self.history.rounds for site, part in entry.sites.items()}  # of each, its last
        images = {site: int(part.numbers["num-examples"]) for site, part in last.items()}
        return Provenance(
            self.history.run,
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            model.adapter_hash(adapter),
            self.history.base,
            self.config.rounds,
            {site: Given(images[site], int(part.counted)) for site, part in last.items()},
            sum(images.values()),
            self.history.config,
            self.history.versions,
            self.privacy(),
        )

    def privacy(self) -> Spent | None:
        """What sites with differential privacy say of it; nothing where there are none."""
        parts = [(site, part.numbers) for entry in self.history.rounds for site, part in entry.sites.items()]
        private = [numbers for _, numbers in parts if "dp-epsilon" in numbers]
        if not private:
            return None
        with_it = {site for site, numbers in parts if "dp-epsilon" in numbers}
        without = {site for site, numbers in parts if "dp-epsilon" not in numbers}
        epsilon, delta = (max(numbers[f"dp-{name}"] for numbers in private) for name in ("epsilon", "delta"))
        return Spent(len(with_it - without), len(with_it | without), epsilon, delta)

    def deed(self, did: str, **facts: Any) -> None:
        """A line of the audit log of all runs, beside them; a full disk does not stop the run."""
        try:
            audit.append(self.folder.parent / AUDIT, did=did, run=self.history.run, **facts)
        except OSError as error:
            print(f"bouquet: not in {AUDIT}: {did} ({type(error).__name__})", flush=True)

    def save(self) -> None:
        """Errors: HUB-09."""
        told = replace(self.history, seconds=round(time.time() - self.began, 1))
        try:
            history.write(self.folder / history.FILE, told)
        except OSError as error:
            raise volume.no_room(self.folder, f"history.json could not be written ({type(error).__name__})") from error


def said_of(reply: guard.Reply) -> Part:
    """What history.json says of a site's reply in a round."""
    norm = None if reply.offer else reply.norm  # of a hidden update nobody knows it
    return Part(reply.metrics, reply.images, reply.bound, norm, reply.gpu, reply.left_out, reply.rank or None)


def _others(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """The keys of a run's configuration that are not those of the run that it goes on from, with both values."""
    return [
        f"{key.replace('_', '-')}={text.line(str(value))} (was {text.line(str(then[key]))})"
        for key, value in now.items()
        if key != "resume" and key in then and then[key] != value
    ]


def hash_of(config: dict[str, Any]) -> str:
    """SHA-256 of a run's configuration as JSON, its keys in order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def own_bundle() -> str:
    """SHA-256 of the bundle that this is, or why it cannot be told: the log is no reason for a run to fail."""
    try:
        return bundle.digest()
    except Exception as error:  # Flower's, of as many kinds
        return type(error).__name__


def _folder(name: str) -> Path:
    """A folder that the hub's operator names in the environment. Errors: HUB-06."""
    if not (value := os.environ.get(name)) or not Path(value).is_dir():
        raise HubError(
            "HUB-06",
            name=name,
            found=f"{name} = {value!r}",
            fix=f"set {name} for flower-superexec to a folder that exists",
        )
    return Path(value)


def _admitted() -> tuple[set[str], dict[str, int]]:
    """The sites that the hub's operator admitted (`<BOUQUET_ADMITTED>/NAME.pub`), and the images that some were
    admitted with (NAME.json).
    """
    if not (folder := os.environ.get("BOUQUET_ADMITTED")):
        return set(), {}
    names = {file.stem for file in Path(folder).glob("*.pub")}
    return names, {file.stem: int(json.loads(file.read_text())["images"]) for file in Path(folder).glob("*.json")}
