"""A round by phase as stacked bars, one a contender."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.speed.contenders import PHASES

COLOURS = ("#8c96a3", "#b7bec8", "#4e79a7", "#f28e2b", "#59a14f", "#edc948", "#e15759", "#d9dde2")


def bars(steady: dict[str, dict[str, float]], file: Path) -> None:
    """Seconds of a steady round; the floor is at the bottom, so that one reads how far above it each is."""
    figure, axes = plt.subplots(figsize=(8, 2.4), layout="constrained")
    for row, medians in enumerate(steady.values()):
        left = 0.0
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            axes.barh(row, medians[phase], left=left, color=colour, label=phase if row == 0 else None)
            left += medians[phase]
        axes.text(left, row, f"  {medians['round']:.1f} s", va="center")
    axes.set_yticks(range(len(steady)), list(steady))
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a steady round")
    axes.set_xlim(0, 1.12 * max(m["round"] for m in steady.values()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
