"""The ServerApp: rounds over Flower's Grid, aggregation, and everything a person reads about the run.

Enters: the run's config, and two folders from the environment: BOUQUET_MODELS and BOUQUET_ADAPTERS (the shared volume).
Leaves: `<adapters>/<run id>/` (see checkpoint.py), one plain line a round on stdout, and a run that ends completed or,
when it cannot go on, failed with a public sentence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from app import aggregate, checkpoint, export, model, wire
from app.config import RunConfig
from app.errors import BouquetError, HubError

app = ServerApp()
POLL = 0.5  # seconds between looks for replies


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
        self.grid, self.config = grid, RunConfig.read(context.run_config)
        adapters, models = (_folder(name) for name in ("BOUQUET_ADAPTERS", "BOUQUET_MODELS"))
        self.folder = adapters / str(context.run_id)
        self.base = model.locate(self.config.base_model, models)
        self.sums = model.fingerprint(self.base)
        self.history: dict[str, Any] = {
            "run": str(context.run_id),
            "state": "running",
            "config": asdict(self.config),
            "base": {"name": self.config.base_model, "fingerprint": self.sums["base"]},
            "versions": export.versions(),
            "rounds": [],
            "validation": [],
        }
        self.began = time.time()

    def go(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()
        try:
            adapter = self.rounds(model.new_adapter(self.base, self.config))
            final = export.write_final(self.folder, adapter, self.config, self.provenance(adapter))
            self.draw()
            self.history["state"] = "finished"
        except BaseException as error:
            self.history |= {"state": "failed", "error": str(error) if isinstance(error, BouquetError) else type(error).__name__}
            raise
        finally:
            self.save()
        checkpoint.point_latest(self.folder)
        print(f"bouquet: finished  adapter {final}  seconds {time.time() - self.began:.0f}", flush=True)

    def rounds(self, adapter: model.Adapter) -> model.Adapter:
        """Every round, then one evaluation of the last aggregate."""
        for number in range(1, self.config.rounds + 1):
            adapter = self.round(number, adapter)
        self.last_evaluation(adapter)
        return adapter

    def last_evaluation(self, adapter: model.Adapter) -> None:
        """What the sites say of the result. The training is done: a site that is gone by now spoils nothing."""
        try:
            replies, self.history["refused_final_evaluation"] = self.exchange("evaluate", self.config.rounds + 1, adapter, model.adapter_hash(adapter))
        except HubError as error:
            self.history["no_final_evaluation"] = str(error)
            print(f"bouquet: no final evaluation\n{error.report()}", flush=True)
            return
        self.note_validation(replies)
        first, last = self.history["validation"][0]["weighted"], self.history["validation"][-1]["weighted"]
        print(f"bouquet: validation {first:.4f} -> {last:.4f} over {self.config.rounds} rounds", flush=True)

    def round(self, number: int, adapter: model.Adapter) -> model.Adapter:
        """Send the global adapter, take the sites' adapters, aggregate, write the round."""
        start, sent = time.time(), model.adapter_hash(adapter)
        replies, refused = self.exchange("train", number, adapter, sent)
        new = aggregate.weighted_mean(replies)
        self.note_validation(replies)
        entry = {
            "round": number,
            "started_from": sent,
            "adapter": model.adapter_hash(new),
            "train_loss": aggregate.weighted(replies, "train-loss"),
            "seconds": round(time.time() - start, 2),
            "sites": {r.site: r.metrics for r in replies},
            "refused": refused,
        }
        self.history["rounds"].append(entry)
        checkpoint.write_round(self.folder, number, new, self.config, entry)
        self.save()
        pace = (time.time() - self.began) / number
        print(
            f"bouquet: round {number}/{self.config.rounds}  train {entry['train_loss']:.4f}  "
            f"validation {self.history['validation'][-1]['weighted']:.4f}  sites {len(replies)}  "
            f"images {sum(r.images for r in replies)}  {entry['seconds']:.0f} s  ETA {pace * (self.config.rounds - number):.0f} s",
            flush=True,
        )
        return new

    def exchange(self, kind: str, number: int, adapter: model.Adapter, sent: str) -> tuple[list[aggregate.Reply], list[dict]]:
        """One message to every site that is there; the valid replies by site name, and the refused ones with reasons.

        Errors: HUB-01 too few sites in time, HUB-02 too few valid replies.
        """
        nodes = self.wait_for_sites()
        order = ConfigRecord({"round": number, "base-fingerprint": self.sums["base"]})
        content = RecordDict({"arrays": wire.pack(adapter), "config": order})
        timeout = self.config.round_timeout
        messages = [Message(content, dst_node_id=n, message_type=kind, ttl=float(timeout + 60), group_id=str(number)) for n in nodes]
        ids = list(self.grid.push_messages(messages))  # '' where the SuperLink did not take one, [] where it took none
        missing = {message_id: node for message_id, node in zip(ids, nodes, strict=False) if message_id}
        unsent = [node for node in nodes if node not in missing.values()]
        replies, refused = [], [{"site": self.name(node), "reason": "HUB-03  The SuperLink did not take its message."} for node in unsent]
        deadline = time.time() + timeout
        while missing and time.time() < deadline:
            for message in self.grid.pull_messages(list(missing)):
                node = missing.pop(message.metadata.reply_to_message_id)
                try:
                    reply = aggregate.accept(message, adapter, sent, training=kind == "train")
                    if reply.site in {other.site for other in replies}:
                        raise HubError("HUB-07", "Another site has the same name.", found=reply.site, fix="give each SuperNode its own site-name")
                    replies.append(reply)
                except BouquetError as error:
                    refused.append({"site": self.name(node), "reason": str(error)})
                    print(f"bouquet: refused  {self.name(node)}: {error}", flush=True)
            if missing:
                time.sleep(POLL)
        refused += [{"site": self.name(node), "reason": f"HUB-03  No reply within {timeout} s."} for node in missing.values()]
        if len(replies) < self.config.min_sites:
            reasons = "; ".join(f"{r['site']}: {r['reason']}" for r in refused)
            raise HubError(
                "HUB-02",
                f"Too few valid replies in round {number}: {len(replies)} of {self.config.min_sites} needed. {reasons}",
                found=f"{len(replies)} valid, {len(refused)} refused or missing",
                fix="mend the sites named above, or lower min-sites, and run again",
            )
        return sorted(replies, key=lambda r: r.site), refused

    def wait_for_sites(self) -> list[int]:
        """The nodes that are online, at least `min-sites` of them."""
        deadline, told = time.time() + self.config.wait_for_sites, False
        while len(nodes := sorted(self.grid.get_node_ids())) < self.config.min_sites:
            if time.time() > deadline:
                raise HubError(
                    "HUB-01",
                    f"Only {len(nodes)} of {self.config.min_sites} sites came within {self.config.wait_for_sites} s.",
                    found=f"{len(nodes)} SuperNodes online",
                    fix="start the missing sites (flwr supernode ls shows which), raise wait-for-sites, or lower min-sites",
                )
            if not told:
                print(f"bouquet: waiting for sites  {len(nodes)} of {self.config.min_sites} are here", flush=True)
                told = True
            time.sleep(1)
        return nodes

    def name(self, node: int) -> str:
        """The name a site was registered under, where the hub knows it; else the node's id."""
        names = {info.node_id: info.name for info in self.grid.get_nodes()}
        return names.get(node) or str(node)

    def note_validation(self, replies: Iterable[aggregate.Reply]) -> None:
        """The arriving adapter's loss at each site: entry k is after k rounds."""
        sites = {r.site: r.metrics["validation-loss"] for r in replies}
        after = len(self.history["validation"])
        self.history["validation"].append({"after_round": after, "weighted": aggregate.weighted(replies, "validation-loss"), "sites": sites})

    def draw(self) -> None:
        """samples.png: the base model, then the adapter after each round, same prompts and seeds."""
        if not self.config.prompts:
            return
        from app import sample

        print("bouquet: drawing samples", flush=True)
        rounds = range(1, self.config.rounds + 1)
        adapters = {f"round {n}": checkpoint.read_adapter(self.folder / f"round-{n:04d}") for n in rounds}
        image = sample.sheet(self.base, {"base": None} | adapters, self.config)
        temporary = self.folder / ".samples.png"
        image.save(temporary, format="PNG")
        temporary.replace(self.folder / "samples.png")

    def provenance(self, adapter: model.Adapter) -> dict[str, Any]:
        last = self.history["rounds"][-1]["sites"]
        return {
            "run": self.history["run"],
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "adapter_sha256": model.adapter_hash(adapter),
            "base": self.history["base"],
            "rounds": self.config.rounds,
            "sites": {site: {"images": int(metrics["num-examples"])} for site, metrics in last.items()},
            "images": int(sum(metrics["num-examples"] for metrics in last.values())),
            "config": self.history["config"],
            "versions": self.history["versions"],
        }

    def save(self) -> None:
        checkpoint.write_json(self.folder / "history.json", self.history | {"seconds": round(time.time() - self.began, 1)})


def _folder(name: str) -> Path:
    """A folder that the hub's operator names in the environment. Errors: HUB-06."""
    if not (value := os.environ.get(name)) or not Path(value).is_dir():
        raise HubError(
            "HUB-06",
            f"The ServerApp needs the folder that {name} names.",
            found=f"{name} = {value!r}",
            fix=f"set {name} for flower-superexec to a folder that exists",
        )
    return Path(value)
