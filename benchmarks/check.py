"""The checker: nothing was lost, nothing is half-written, and the result is the mean of what the sites really sent.

  python -m benchmarks.check RUN_FOLDER --models MODELS --cache site-1=FOLDER --cache site-2=FOLDER … [--state
  finished:completed]

Reads the sites' journals (written with BOUQUET_KEEP_SENT set), the hub's history and the output volume, and imports
nothing of what wrote them: names of tensors and shapes are diffusers' and PEFT's, the hash and the mean are worked out
here.
Leaves: one sentence for each thing that does not hold; none, and exit code 0, where everything does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from bouquet import ROOT

Adapter = dict[str, torch.Tensor]  # by PEFT's names, without PREFIX
PREFIX = "base_model.model."  # what PEFT writes before each name
TARGETS = {
    "attention": {"to_q", "to_k", "to_v", "to_out.0"},
    "attention+resnet": {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv1",
        "conv2",
        "conv_shortcut",
        "proj_in",
        "proj_out",
        "time_emb_proj",
    },  # fmt: skip
}

A_ROUND = {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "server_state.safetensors"}
CLOSE = 1e-6  # largest difference to the mean in float64


@dataclass(frozen=True)
class Evidence:
    """What is judged: a run's folder, the sites' cache folders, how Flower says the run ended and how long it took."""

    run: Path
    sites: Mapping[str, Path]
    models: Path
    state: str = "finished:completed"
    seconds: float = 0.0
    limit: float = float("inf")  # seconds in which it had to end
    # folder -> hash of the adapters that were there before the fault (`adapters()`)
    before: Mapping[str, str] | None = None

    @property
    def volume(self) -> Path:
        return self.run.parent

    def history(self) -> dict[str, Any]:
        return json.loads((self.run / "history.json").read_text())

    def adapter(self, folder: str) -> Adapter:
        return {
            key.removeprefix(PREFIX): value
            for key, value in load_file(self.run / folder / "adapter_model.safetensors").items()
        }


def check(evidence: Evidence) -> list[str]:
    """Every sentence that does not hold; [] where all is well."""
    problems = list(half_written(evidence.volume))
    if problems:
        return problems  # the rest reads these files
    for assertion in (ended, rounds, adapter_is_whole, means, latest, lost):
        problems += assertion(evidence)
    return problems


def half_written(volume: Path) -> Iterator[str]:
    """Every file that has its name loads; what is not finished is called .something."""
    for path in sorted(volume.rglob("*")):
        name = str(path.relative_to(volume))
        if path.is_dir() or path.is_symlink() or any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            match path.suffix:
                case ".safetensors":
                    load_file(path)
                case ".json":
                    json.loads(path.read_text())
                case ".png":
                    Image.open(path).load()
                case ".jsonl" if name == "audit.jsonl":  # a kill may leave a piece of a line, which bouquet audit names
                    continue
                case _:
                    yield f"{name} is no file of a run"
        except Exception as error:
            yield f"{name} does not load ({type(error).__name__})"
    for folder in sorted(volume.glob("[0-9]*/round-*")):
        if (found := {path.name for path in folder.iterdir()}) != A_ROUND:
            yield f"{folder.relative_to(volume)} holds {', '.join(sorted(found))}"


def ended(evidence: Evidence) -> Iterator[str]:
    """In a declared state, in a declared time. A ServerApp that was killed cannot write `failed`: there Flower says it
    alone.
    """
    said = evidence.history()["state"]
    if (evidence.state, said) not in {
        ("finished:completed", "finished"),
        ("finished:failed", "failed"),
        ("finished:failed", "running"),
    }:
        yield f"Flower says {evidence.state!r}, the history says {said!r}"
    if evidence.seconds > evidence.limit:
        yield f"the run took {evidence.seconds:.0f} s, {evidence.limit:.0f} s were allowed"


def rounds(evidence: Evidence) -> Iterator[str]:
    """1, 2, 3, …, each from where the one before ended; the volume has none that the history has not, and no site went
    back.
    """
    history = evidence.history()
    entries = history["rounds"]
    if (numbers := [entry["round"] for entry in entries]) != list(range(1, len(entries) + 1)):
        yield f"the history's rounds are {numbers}"
    for one, other in zip(entries, entries[1:], strict=False):
        if other["started_from"] != one["adapter"]:
            yield f"round {other['round']} did not start from round {one['round']}'s adapter"
    told = {f"round-{entry['round']:04d}": entry["adapter"] for entry in entries}
    for folder in sorted(evidence.run.glob("round-*")):
        # killed between the two writings, a run has one round more than it could tell; its own metrics.json tells it
        entry = json.loads((folder / "metrics.json").read_text())
        if folder.name not in told and not (history["state"] == "running" and entry["round"] == len(entries) + 1):
            yield f"the history does not know {folder.name}"
        if digest(evidence.adapter(folder.name)) != told.get(folder.name, entry["adapter"]):
            yield f"{folder.name} is not the adapter that the history names"
    for site, cache in evidence.sites.items():
        went = [line["round"] for line in journal(cache) if line["run"] == history["run"]]
        if went != sorted(went):
            yield f"{site} was sent back: rounds {went}"


def adapter_is_whole(evidence: Evidence) -> Iterator[str]:
    """The newest adapter has the base model's keys and shapes, float32, and only finite numbers."""
    history = evidence.history()
    folders = sorted(folder.name for folder in evidence.run.glob("round-*")) + ["final"] * (
        history["state"] == "finished"
    )
    if not folders:
        return
    settings = json.loads((evidence.run / folders[-1] / "adapter_config.json").read_text())
    base, rank = evidence.models / history["config"]["base_model"], history["config"]["lora_rank"]
    # a transformer's layers have each family's names: the file's own are taken, and must be there
    unet = part_of(base) == "unet"
    targets = TARGETS[history["config"]["lora_targets"]] if unet else set(settings["target_modules"])
    alpha = history["config"].get("lora_alpha") or rank
    if (settings["r"], settings["lora_alpha"], set(settings["target_modules"])) != (rank, alpha, targets):
        yield "adapter_config.json is not what the run was asked for"
    yield from misfits(
        evidence.adapter(folders[-1]),
        fresh(base, rank, targets, history["config"].get("rank_pattern", "")),
    )
    if folders[-1] == "final":
        yield from _result(evidence, history)


def _result(evidence: Evidence, history: dict[str, Any]) -> Iterator[str]:
    """The final adapter is the last round's; with ema-decay, the average of all that are still there, by hand."""
    final, decay = evidence.adapter("final"), history["config"].get("ema_decay", 0.0)
    if not decay:
        if digest(final) != history["rounds"][-1]["adapter"]:
            yield "the final adapter is not the last round's"
        return
    state = load_file(evidence.run / f"round-{history['rounds'][-1]['round']:04d}" / "server_state.safetensors")
    held = {key.removeprefix("ema/"): value for key, value in state.items() if key.startswith("ema/")}
    if digest(held) != history["rounds"][-1]["average"]:
        yield "the last round's moving average is not the one that the history names"
    sent = {key: value.half().float() for key, value in held.items()}
    if digest(final) != digest(sent if history["config"]["wire_precision"] == "fp16" else held):
        yield "the final adapter is not the last round's moving average"
    rounds = [evidence.adapter(folder.name) for folder in sorted(evidence.run.glob("round-*"))]
    whole = len(rounds) == len(history["rounds"]) and all(entry.get("average") for entry in history["rounds"])
    if whole:
        by_hand = {key: value.double() for key, value in rounds[0].items()}
        for adapter in rounds[1:]:
            by_hand = {key: decay * value + (1 - decay) * adapter[key].double() for key, value in by_hand.items()}
        far = max((held[key].double() - value).abs().max().item() for key, value in by_hand.items())
        if far > CLOSE:
            yield f"the moving average is {far:.1e} away from the one over the rounds in float64"


def fresh(base: Path, rank: int, targets: set[str], pattern: str = "") -> Adapter:
    """An adapter of that rank, or those of the pattern, on these layers of a base model's net: names, shapes and types,
    without contents.
    """
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    file = base / part_of(base) / "config.json"
    settings = json.loads(file.read_text())
    with torch.device("meta"):
        net = getattr(diffusers, settings["_class_name"]).from_config(settings)
        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(targets))
        pairs = [part.strip().split("=") for part in pattern.split(",") if part]
        lora.rank_pattern = {rf"(?:.*\.)?{re.escape(words)}(?:\..*)?": int(other) for words, other in pairs}
        inject_adapter_in_model(lora, net)
    return dict(get_peft_model_state_dict(net))


def part_of(base: Path) -> str:
    """The folder of the net that is trained."""
    return next(part for part in ("unet", "transformer") if (base / part).is_dir())


def digest(adapter: Adapter) -> str:
    """SHA-256 over name, shape and type on a line and the numbers' little-endian bytes, by name."""
    total = hashlib.sha256()
    for name, value in sorted(adapter.items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()


def journal(cache: Path) -> list[dict[str, Any]]:
    """A site's journal: one line of JSON a message; what follows the last newline was cut off."""
    file = cache / "journal.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [entry for line in lines if "did" not in (entry := json.loads(line))]  # that is no answer to a message


def misfits(adapter: Adapter, like: Adapter) -> Iterator[str]:
    """How an adapter differs from `like` in keys, shapes and types, and whether a number of it is not finite."""
    if adapter.keys() != like.keys():
        yield f"the adapter has {len(adapter.keys() ^ like.keys())} keys too many or too few"
    for key in adapter.keys() & like.keys():
        if (adapter[key].shape, adapter[key].dtype) != (like[key].shape, like[key].dtype):
            yield (
                f"{key} is {tuple(adapter[key].shape)} {adapter[key].dtype}, not {tuple(like[key].shape)}"
                f" {like[key].dtype}"
            )
    if broken := [key for key, value in adapter.items() if not torch.isfinite(value).all()]:
        yield f"{len(broken)} tensors have numbers that are not finite"


def means(evidence: Evidence) -> Iterator[str]:
    """Each round is the mean of adapters that the sites really sent in it, from the adapter that the hub sent, by their
    images; where the sites hid them, it is their sum.
    """
    history = evidence.history()
    runs = {history["run"], *_earlier(evidence.volume, history)}
    for entry in history["rounds"]:
        accepted = []
        for site, sent in sorted(entry["adapters"].items()):
            lines = [line for line in journal(evidence.sites[site]) if line["sent"] == sent and line["run"] in runs]
            if not any((line["round"], line["applied"]) == (entry["round"], entry["started_from"]) for line in lines):
                yield f"round {entry['round']}: {site} never sent {sent[:12]}"
                continue
            weight = entry["sites"][site]["weight"]
            if not 0 < weight <= lines[0]["images"]:
                yield f"round {entry['round']}: {site} weighs {weight}, it has {lines[0]['images']} images"
            adapter = load_file(evidence.sites[site] / "sent" / f"{sent}.safetensors")
            if digest(adapter) != sent:
                yield f"round {entry['round']}: {site}'s copy of {sent[:12]} is another adapter"
            accepted.append((weight, adapter))
        if len(accepted) < len(entry["adapters"]) or history["config"]["strategy"] != "fedavg":
            continue
        if history["config"].get("secrecy") == "masks":
            yield from hidden_mean(evidence, entry, [sent["masked"].numpy() for _, sent in accepted])
        else:
            if digest(mean(accepted)) != entry["adapter"]:
                yield f"round {entry['round']} is not the mean of the accepted replies"
            folder = evidence.run / f"round-{entry['round']:04d}"
            if folder.exists() and (far := farthest(evidence.adapter(folder.name), accepted)) > CLOSE:
                yield f"round {entry['round']} is {far:.1e} away from the mean in float64"


def hidden_mean(evidence: Evidence, entry: dict[str, Any], sent: list[np.ndarray]) -> Iterator[str]:
    """Whether a round moved by the sum of what the sites hid, modulo 2^32; of the first one nobody kept where it began.

    A whole number is worth 2^-30 of the clip, and each site has weighed its update itself.
    """
    before, after = (evidence.run / f"round-{entry['round'] - back:04d}" for back in (1, 0))
    if not before.exists() or not after.exists():
        return
    total = np.add.reduce([numbers.astype(np.int64) for numbers in sent]) % 2**32
    mean = np.where(total < 2**31, total, total - 2**32) * (evidence.history()["config"]["update_clip"] / 2**30)
    one, other = (
        torch.cat([value.flatten().double() for _, value in sorted(evidence.adapter(folder.name).items())]).numpy()
        for folder in (before, after)
    )
    if len(mean) != len(one) or (far := np.abs(other - one - mean).max()) > CLOSE:
        how = "of another size" if len(mean) != len(one) else f"{far:.1e} away"
        yield f"round {entry['round']} did not move by the sum of what the sites hid: {how}"


def _earlier(volume: Path, history: dict[str, Any]) -> Iterator[str]:
    """The runs that this one went on from."""
    while source := history.get("resumed", {}).get("run"):
        yield source
        if not (volume / source / "history.json").exists():
            return
        history = json.loads((volume / source / "history.json").read_text())


def mean(weighted: list[tuple[int, Adapter]]) -> Adapter:
    """The weighted mean in float32, in this order: the same sums that FedAvg makes, so the same bits."""
    total = sum(weight for weight, _ in weighted)
    keys = weighted[0][1]
    return {
        key: torch.from_numpy(np.asarray(sum(value[key].numpy() * (weight / total) for weight, value in weighted)))
        for key in keys
    }


def farthest(adapter: Adapter, weighted: list[tuple[int, Adapter]]) -> float:
    """Largest difference of any number to the weighted mean in float64."""
    total = sum(weight for weight, _ in weighted)
    return max(
        (value.double() - sum(w * a[key].double() for w, a in weighted) / total).abs().max().item()
        for key, value in adapter.items()
    )


def latest(evidence: Evidence) -> Iterator[str]:
    """`latest`, where there is one, is a finished run with its final adapter; this run, if it finished last."""
    link = evidence.volume / "latest"
    if not link.is_symlink():
        if evidence.history()["state"] == "finished":
            yield "the run has finished, and there is no latest"
        return
    if not (link / "final" / "adapter_model.safetensors").exists():
        yield f"latest is {link.readlink()}, which has no final adapter"
    finished = link.resolve() == evidence.run.resolve()
    if finished != (evidence.history()["state"] == "finished"):
        yield f"latest is {link.readlink()}, the run's state is {evidence.history()['state']!r}"


def adapters(volume: Path) -> dict[str, str]:
    """Hash of every adapter on the volume, by its folder."""
    files = sorted(
        path for path in volume.glob("[0-9]*/*/adapter_model.safetensors") if not path.parent.name.startswith(".")
    )
    return {str(file.parent.relative_to(volume)): digest(load_file(file)) for file in files}


def lost(evidence: Evidence) -> Iterator[str]:
    """Every adapter that was there before the fault is there as it was."""
    now = adapters(evidence.volume)
    for folder, was in (evidence.before or {}).items():
        if now.get(folder) != was:
            yield f"lost: the adapter of {folder} is {'another' if folder in now else 'gone'}"


def check_stock(file: Path, like: Adapter, honest: Adapter | None) -> list[str]:
    """The same questions to a file that a plain FedAvg saved: it is there, loads, fits, is finite, and is the honest
    mean.
    """
    try:
        adapter = load_file(file)
    except Exception as error:
        return [f"no adapter that loads ({type(error).__name__})"]
    problems = list(misfits(adapter, like))
    if not problems and honest is not None:
        far = max((adapter[key].double() - honest[key].double()).abs().max().item() for key in honest)
        problems += [f"it is {far:.1e} away from the honest sites' mean"] * (far > CLOSE)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--cache", action="append", default=[], metavar="SITE=FOLDER")
    parser.add_argument("--state", default="finished:completed", help="what flwr ls says")
    args = parser.parse_args()
    sites = {name: Path(folder) for name, _, folder in (each.partition("=") for each in args.cache)}
    problems = check(Evidence(args.run, sites, args.models, args.state))
    print("\n".join(problems) or "whole: every adapter loads and is the mean of what the sites sent")
    return bool(problems)


if __name__ == "__main__":
    from bouquet.ended import quietly

    sys.exit(quietly(main))
