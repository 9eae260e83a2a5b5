"""What a person should know about a run, in plain words: did it work, and what to look at.

Enters: a `Run`. Leaves: one sentence, and warnings. Pure functions but for `adapter_files`, which reads headers in
`final/`.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from app import metrics
from app.hub.history import Part
from bouquet.report import memorisation
from bouquet.report.reading import Run

NOTICEABLE = 0.005  # a loss on fixed noise that changes by less than this share has not changed
FAR = 3.0  # times the other sites' median: a norm or a time that is worth a look
HEAVY = 0.8  # share of all images from which the mean is nearly one site's own


def percent(new: float, old: float) -> str:
    """'−51 %' for a change from old to new; '' where there is nothing to compare with."""
    return f"{(new - old) / old:+.0%}".replace("%", " %").replace("-", "−") if old else ""


def outcome(run: Run) -> str:
    """One sentence: did it work?"""
    done = f"{len(run.rounds)} of {run.wanted} rounds"
    if run.state == "failed":
        return f"No: the run failed after {done}."
    if run.state == "running":
        losses = [entry.weighted for entry in run.validation]
        so_far = (
            f"; the validation loss went from {losses[0]:.4f} to {losses[-1]:.4f} so far" if len(losses) > 1 else ""
        )
        return f"Not known yet: the run is working, {done} are done{so_far}."
    if len(run.validation) < 2:
        if any("dp-epsilon" in part.numbers for entry in run.rounds for part in entry.sites.values()):
            return f"The run finished {done}. Its sites have differential privacy, and tell no losses."
        return f"The run finished {done}, but the result was not measured."
    first, last = run.validation[0].weighted, run.validation[-1].weighted
    numbers = f"from {first:.4f} to {last:.4f} ({percent(last, first)})"
    if last > first * (1 + NOTICEABLE):
        return f"No: the validation loss rose {numbers}."
    if last > first * (1 - NOTICEABLE):
        return f"Hardly: the validation loss went {numbers}."
    not_at = [name for name in run.names if (own := run.losses(name)) and own[-1][1] >= own[0][1]]
    return (
        f"Yes: the validation loss fell {numbers},"
        f" {'but not at ' + ', '.join(not_at) if not_at else 'and at every site'}."
    )


def warnings(run: Run) -> list[str]:
    """Everything that deserves a look, the gravest first."""
    files, sites = (broken_chain, adapter_files), (refusals, absences, rising, far_norms, bounded, one_heavy, left_out)
    checks = (silent, remembered, *files, *sites, slow, set_aside)
    return [sentence for check in checks for sentence in check(run)]


def silent(run: Run) -> Iterator[str]:
    limit = run.config.get("round_timeout", 3600)
    if run.state == "running" and run.now - run.written > limit:
        hours = (run.now - run.written) / 3600
        yield (
            f"The run has written nothing for {hours:.1f} h, longer than a round may take: it may have ended without"
            " saying so. Ask: flwr ls remote-deployment"
        )
    if why := run.history.no_final_evaluation:
        yield f"The result was not measured by the sites: {why}"


def remembered(run: Run) -> Iterator[str]:
    for found in memorisation.all_found(run.memory) if run.memory else ():
        if found.rare:
            yield (
                f"The adapter may draw photos of {found.site}: {found.suspicious} of its samples"
                f" {'are' if found.suspicious > 1 else 'is'} too near to one of them."
            )


def broken_chain(run: Run) -> Iterator[str]:
    """Each round must start from what the one before it left, and the final files must be the last round's."""
    for before, after in zip(run.rounds, run.rounds[1:], strict=False):
        if after.started_from != before.adapter:
            yield f"Round {after.round} did not start from round {before.round}'s adapter."
    final = run.provenance.adapter_sha256
    if not final or not run.rounds:
        return
    last = run.rounds[-1]
    left = last.average or last.adapter
    as_it_is = not last.average or run.config.get("wire_precision") != "fp16"  # else rounded before it was sent
    if as_it_is and final != left:
        yield f"The final adapter is not round {last.round}'s: {final[:12]} instead of {left[:12]}."


ALPHAS = {"lora_alpha": 0.0, "lora_scaling": "plain", "rank_pattern": ""}  # with these alpha is the rank


def adapter_files(run: Run) -> Iterator[str]:
    """Every file of the final folder must scale the adapter alike: alpha / rank, 1 where the run did not ask for
    another; of one that did, `bouquet adapter parity` compares the pictures.
    """
    if any(run.config.get(key) not in (None, usual) for key, usual in ALPHAS.items()):
        return
    found = {path: scales(path) for path in sorted((run.folder / "final").rglob("*.safetensors"))}
    for path, values in found.items():
        name = path.relative_to(run.folder)
        if values is None:
            yield f"{name} cannot be read."
        elif values - {1.0}:
            shown = ", ".join(f"{value:g}" for value in sorted(values))
            yield (
                f"{name} has an alpha that is not its rank (alpha / rank = {shown}): other tools will draw weaker or"
                " stronger pictures with it."
            )


def scales(file: Path) -> set[float] | None:
    """Every alpha / rank that a LoRA file names: beside it (PEFT), in its metadata (diffusers, kohya), in its tensors
    (kohya).
    """
    try:
        with safe_open(file, "numpy") as opened:
            notes = opened.metadata() or {}
            keys = list(opened.keys())
            alphas = {
                key.removesuffix(".alpha"): float(opened.get_tensor(key)) for key in keys if key.endswith(".alpha")
            }
            ranks = {
                key.split(part)[0]: opened.get_slice(key).get_shape()[0]
                for key in opened.keys()  # noqa: SIM118
                for part in (".lora_A.", ".lora_down.")
                if part in key
            }
        beside = file.with_name("adapter_config.json")
        named = []
        if file.name == "adapter_model.safetensors" and beside.is_file():
            named.append(json.loads(beside.read_text())["lora_alpha"])
        if "lora_adapter_metadata" in notes:
            named += [
                value for key, value in json.loads(notes["lora_adapter_metadata"]).items() if key.endswith("lora_alpha")
            ]
        if "ss_network_alpha" in notes:
            named.append(float(notes["ss_network_alpha"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return {alphas[layer] / rank for layer, rank in ranks.items() if layer in alphas} | {
        alpha / r for alpha in named for r in ranks.values()
    }


def refusals(run: Run) -> Iterator[str]:
    """One sentence a site, with the reason given last."""
    by_site = defaultdict(list)
    for where, site, reason in run.refused:
        by_site[site].append((where, reason))
    for site, cases in sorted(by_site.items()):
        rounds = list(dict.fromkeys(where for where, _ in cases))
        where = rounds[0] if rounds == ["last evaluation"] else f"round{'s' * (len(rounds) > 1)} {', '.join(rounds)}"
        yield f"{site} was left out of {where}: {cases[-1][1]}"


def absences(run: Run) -> Iterator[str]:
    said = {(where, site) for where, site, _ in run.refused}
    for site in run.names:
        rounds = [e.round for e in run.rounds if site not in e.sites and (str(e.round), site) not in said]
        if rounds:
            yield f"{site} did not take part in round{'s' * (len(rounds) > 1)} {', '.join(map(str, rounds))}."


def rising(run: Run) -> Iterator[str]:
    """A site that the run made worse, or that has been getting worse for three rounds."""
    for site in run.names:
        losses = [loss for _, loss in run.losses(site)]
        if len(losses) > 1 and losses[-1] > losses[0] * (1 + NOTICEABLE):
            yield (
                f"{site}'s validation loss rose from {losses[0]:.4f} to {losses[-1]:.4f}"
                f" ({percent(losses[-1], losses[0])}): what the others' photos teach does not suit this site's, or it"
                " trains too hard (learning-rate, local-steps)."
            )
        elif (
            len(losses) > 3
            and losses[-4] < losses[-3] < losses[-2] < losses[-1]
            and losses[-1] > losses[-4] * (1 + NOTICEABLE)
        ):
            yield (
                f"{site}'s validation loss has risen for three rounds, from {losses[-4]:.4f} to {losses[-1]:.4f}: fewer"
                " rounds may do better."
            )


def far_norms(run: Run) -> Iterator[str]:
    """An accepted update that is much longer or shorter than the others' of the same round; of two, the longer is
    named.
    """
    odd = defaultdict(list)
    for entry in run.rounds:
        norms = {site: part.norm for site, part in entry.sites.items() if part.norm is not None}
        for site, norm in norms.items():
            others = [value for other, value in norms.items() if other != site]
            middle = statistics.median(others) if others else 0
            if norm > FAR * middle > 0 or (len(others) > 1 and norm * FAR < middle):
                odd[site].append((entry.round, norm / middle))
    for site, cases in sorted(odd.items()):
        number, ratio = max(cases, key=lambda case: max(case[1], 1 / case[1]) if case[1] else float("inf"))
        yield (
            f"{site}'s update was {ratio:.1f} times as long as the other sites' in round"
            f" {number}{f' and in {len(cases) - 1} more' if len(cases) > 1 else ''}: its photos or captions may differ"
            " from theirs, or something is wrong there."
        )


def bounded(run: Run) -> Iterator[str]:
    """A site that counts for fewer images than it says; of several rounds the last."""
    every = [(site, part) for entry in run.rounds for site, part in entry.sites.items()]
    cases = {site: part for site, part in every if part.counted < (part.images or 0)}
    for site, part in sorted(cases.items()):
        yield metrics.bounded(site, part.images or 0, part.counted, part.bound)


def one_heavy(run: Run) -> Iterator[str]:
    if not run.rounds or len(sites := run.rounds[-1].sites) < 2:
        return
    weights = {site: part.counted for site, part in sites.items()}
    site, total = max(weights, key=lambda name: weights[name]), sum(weights.values())
    if weights[site] >= (HEAVY - 1e-9) * total or sites[site].bound == metrics.SHARE:
        yield f"{site} weighs {weights[site] / total:.0%} in the mean: the result is nearly its own.".replace("%", " %")


def left_out(run: Run) -> Iterator[str]:
    """A site whose replies held what no site of this version sends."""
    every = [(site, part) for entry in run.rounds for site, part in entry.sites.items()]
    for site, count in sorted({site: part.left_out for site, part in every if part.left_out}.items()):
        yield (
            f"{site} sent {count:,} numbers that no site of this version sends, or that cannot be true; they were left"
            " out. Ask which version it runs."
        )


def slow(run: Run) -> Iterator[str]:
    """A site for which the others wait."""
    took = {
        site: statistics.median(values) for site in run.names if (values := [busy(part) for _, part in run.parts(site)])
    }
    for site, seconds in took.items():
        others = [value for other, value in took.items() if other != site]
        if others and seconds > FAR * statistics.median(others) > 0 and seconds > 5:
            yield (
                f"{site} works {seconds:.0f} s a round, the others {statistics.median(others):.0f} s: every round waits"
                " for it."
            )


def busy(part: Part) -> float:
    """Seconds that a site says it worked."""
    return sum(max(0.0, value) for name, value in part.numbers.items() if name.startswith("seconds-"))


def set_aside(run: Run) -> Iterator[str]:
    if not run.rounds:
        return
    for site, part in run.rounds[-1].sites.items():
        numbers = part.numbers
        bad = {
            name.removeprefix("photos-"): int(count)
            for name, count in numbers.items()
            if name.startswith("photos-") and count
        }
        if bad:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
            yield f"{site} set aside {sum(bad.values())} of its files ({reasons}); its own log names them."
        if small := int(numbers.get("enlarged", 0)):
            yield f"{site} has {small} photos smaller than what is trained on: they were enlarged, and are less sharp."
        if cut := int(numbers.get("captions-cut", 0)):
            yield (f"{site} has {cut} captions longer than the base model reads: it learned from their beginnings.")
