"""The page: everything about a run as one HTML text. The template shows; what is shown is worked out here.

Enters: a `Run`. Leaves: HTML with its style, script, charts and pictures inside. Autoescape is on for every value, and
the page's own Content-Security-Policy allows no request and no script but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from app.hub.history import Part
from bouquet.report import charts, findings, memorisation, pictures, worth
from bouquet.report.comparison import CONTENDERS
from bouquet.report.reading import Run

HERE = Path(__file__).parent
PHASES = {
    "start": "start",
    "encode": "encode photos",
    "load": "load the model",
    "evaluate": "validate",
    "train": "train",
}
REST = "start, travel, wait"


def templates(folder: Path) -> Environment:
    """The templates of a folder: every value is escaped, and one that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=together,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "seconds": seconds, "number": number, "percent": share}
    return environment


def page(run: Run) -> str:
    """The whole page."""
    script = (HERE / "page.js").read_text()
    return (
        templates(HERE)
        .get_template("page.html")
        .render(
            run=run,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            style=Markup((HERE / "page.css").read_text()),
            made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.now)),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.written)),
            outcome=findings.outcome(run),
            warnings=findings.warnings(run),
            legend=legend(run),
            loss=loss(run),
            norms=norms(run),
            averaging=averaging(run),
            sites=[site(run, name) for name in run.names],
            times=times(run),
            gpus=[row for name in run.names if (row := gpu(run, name))],
            samples=pictures.cut(run.folder / "samples.png", run.config, len(run.rounds)),
            losses={entry.after_round: entry.weighted for entry in run.validation},
            joining=joining(run),
            gains=gains(run),
            remembering=remembering(run),
        )
    )


def legend(run: Run) -> list[dict[str, str]]:
    """The first eight sites with their sign and colour."""
    return [sign(i, name) for i, name in enumerate(run.names[:8])]


def sign(series: int, name: str) -> dict[str, str]:
    """A legend's entry: how a chart draws this series, and its name."""
    return {"name": name, "mark": charts.MARKS[series], "colour": f"var(--c{series})"}


def loss(run: Run) -> dict[str, Any] | None:
    """The validation chart, and its numbers by round."""
    if not run.validation:
        return None
    mean = [(entry.after_round, entry.weighted) for entry in run.validation]
    train = [run.metric(name, "train-loss") for name in run.names]
    return {
        "validation": Markup(
            charts.lines(
                [run.losses(name) for name in run.names], mean, "rounds trained", "Validation loss by site and round"
            )
        ),
        "train": Markup(
            charts.lines(
                train,
                [(e.round, e.train_loss) for e in run.rounds if e.train_loss is not None],
                "round",
                "Training loss by site and round",
            )
        ),
    }


def norms(run: Run) -> Markup | None:
    """How far each site moved the adapter in each round, where the hub measured it."""
    found = [[(n, part.norm) for n, part in run.parts(name) if part.norm is not None] for name in run.names]
    return Markup(charts.lines(found, [], "round", "Length of each site's update")) if any(found) else None


def averaging(run: Run) -> dict[str, Any] | None:
    """What averaging A and B apart lost, by round; None before the first round."""
    if not run.rounds:
        return None
    found = [
        (entry.round, 100 * entry.aggregation_error) for entry in run.rounds if entry.aggregation_error is not None
    ]
    last = run.rounds[-1].aggregation_error
    chart = Markup(charts.lines([], found, "round", "What averaging lost in each round, %")) if len(found) > 1 else None
    return {"last": None if last is None else f"{100 * last:.2g} %", "chart": chart}


def site(run: Run, name: str) -> dict[str, Any]:
    """What one site contributed."""
    parts, losses = run.parts(name), run.losses(name)
    last = parts[-1][1]
    everyone = [entry.sites for entry in run.rounds if name in entry.sites][-1]
    total = sum(part.counted for part in everyone.values())
    return {
        "name": name,
        "images": last.images,
        "weight": last.counted / total if total else None,
        "rounds": len(parts),
        "epsilon": last.numbers.get("dp-epsilon"),
        "refused": sum(who == name for _, who, _ in run.refused),
        "first": losses[0][1] if losses else None,
        "last": losses[-1][1] if losses else None,
        "change": findings.percent(losses[-1][1], losses[0][1]) if len(losses) > 1 else "",
        "adapter": next((e.adapters[name] for e in reversed(run.rounds) if name in e.adapters), None),
    }


def times(run: Run) -> dict[str, Any] | None:
    """Where a round's seconds go: the slowest site's phases and the rest, by round; and each site's mean round."""
    if not run.rounds:
        return None
    parts: list[list[float]] = [[] for _ in range(len(PHASES) + 1)]
    for entry in run.rounds:
        slowest = max(entry.sites.values(), key=findings.busy, default=Part({}))
        own = [max(0.0, slowest.numbers.get(f"seconds-{phase}", 0.0)) for phase in PHASES]
        for part, value in zip(parts, [*own, max(0.0, entry.seconds - sum(own))], strict=True):
            part.append(value)
    rows = []
    for name in run.names:
        mean = {
            phase: statistics.fmean(max(0.0, v) for _, v in values)
            for phase in PHASES
            if (values := run.metric(name, f"seconds-{phase}"))
        }
        rows.append({"name": name, "phases": [mean.get(phase) for phase in PHASES], "sum": sum(mean.values())})
    names = [*PHASES.values(), REST]
    colours = [f"var(--c{i})" for i in range(len(PHASES))] + ["var(--line)"]
    return {
        "chart": Markup(charts.stacks(parts, [entry.round for entry in run.rounds], "Seconds a round by phase")),
        "legend": [
            {"name": n, "colour": c, "mean": statistics.fmean(p)} for n, c, p in zip(names, colours, parts, strict=True)
        ],
        "names": list(PHASES.values()),
        "rows": rows,
    }


def gpu(run: Run, name: str) -> dict[str, Any] | None:
    """A site's GPU over all rounds; None where none was measured."""
    peak, busy, joules = (
        [value for _, value in run.metric(name, f"gpu-{what}")] for what in ("peak-mib", "utilisation", "joules")
    )
    if not (peak or busy or joules):
        return None
    images = (
        run.config.get("batch_size", 0)
        * run.config.get("gradient_accumulation", 1)
        * run.config.get("local_steps", 0)
        * len(joules)
    )
    known = [part.gpu for _, part in run.parts(name)]
    return {
        "name": name,
        "device": known[-1] if known else "",
        "peak": max(peak, default=None),
        "busy": statistics.fmean(busy) if busy else None,
        "joules": sum(joules) if joules else None,
        "each": sum(joules) / images if joules and images else None,
    }


def joining(run: Run) -> list[dict[str, Any]]:
    """A verdict, a table and a chart for each site; [] where nothing was compared."""
    if not run.worth:
        return []
    rows = []
    for i, found in enumerate(worth.verdicts(run.worth)):
        measured = run.worth.sites[found.site]
        values = {name: measured.loss[name] for name in CONTENDERS if measured.loss.get(name)}
        chart = Markup(charts.dots(values, f"Loss of each contender by seed, site {i + 1} of the table"))
        head, _, rest = found.sentence.partition(":")
        row = {
            "letter": letter(i),
            "verdict": found,
            "head": head,
            "rest": rest,
            "table": worth.table(measured),
            "chart": chart,
            "judged": bool(measured.judge),
        }
        drawn = pictures.unpacked(measured.picture)
        rows.append(
            row | {"picture": drawn and {"uri": pictures.uri(drawn), "width": drawn.width, "height": drawn.height}}
        )
    return rows


# what is a series of the picture of all sites: (who, where), and what its legend says
SERIES = {
    ("federated", worth.OWN): "own photos",
    ("federated", worth.OTHERS): "the others' photos",
    ("personal", worth.OWN): "own photos, trained on at home",
    ("pooled", worth.OWN): "own photos, all pooled",
    ("pooled", worth.OTHERS): "the others' photos, all pooled",
}


def letter(place: int) -> str:
    """What stands for a site in the picture of all: A to Z, then numbers."""
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def gains(run: Run) -> dict[str, Any] | None:
    """One picture of all sites' halves, with its legend; None where nothing was compared."""
    if not run.worth:
        return None
    known, found = list(SERIES), [one.halves for one in worth.verdicts(run.worth)]
    rows = {
        letter(i): [
            (known.index((half.who, half.where)), 100 * half.gain, half.band and 100 * half.band) for half in halves
        ]
        for i, halves in enumerate(found)
    }
    there = {(half.who, half.where) for halves in found for half in halves}
    return {
        "chart": Markup(charts.gains(rows, "What joining changes at each site, on its own photos and the others'")),
        "legend": [sign(i, words) for i, (key, words) in enumerate(SERIES.items()) if key in there],
        "tie": share(worth.TIE),
        "personal": ("personal", worth.OWN) in there,
        "halved": ("federated", worth.OTHERS) in there,
    }


def remembering(run: Run) -> list[dict[str, Any]]:
    """A sentence and a chart for each site that measured it; [] where nobody did."""
    if not run.memory:
        return []
    rows = []
    for i, found in enumerate(memorisation.all_found(run.memory)):
        measured = run.memory.sites[found.site]
        values: dict[str, Sequence[float]] = {"held-out photos": measured.held_out, "samples": measured.samples}
        chart = charts.strip(
            values, min(measured.held_out), f"How near to one training photo, site {i + 1} of the list"
        )
        rows.append({"found": found, "chart": Markup(chart), "photos": measured.photos, "space": measured.space})
    return rows


def together(value: Any) -> Any:
    """A number and its % on one line."""
    return value.replace(" %", "\u00a0%") if type(value) is str else value


def short(text: str | None) -> str:
    """The first 12 characters of a hash."""
    return text[:12] if text else ""


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 90:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def number(value: float | None, digits: int = 0) -> str:
    """'1 234'; '–' for nothing."""
    return "–" if value is None else f"{value:,.{digits}f}".replace(",", "\u202f")


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}".replace("%", " %")
