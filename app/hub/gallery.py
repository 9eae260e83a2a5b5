"""samples.png, which grows while the run works: a row for the base model and one for each round, or every so many where
there are more than MOST; same prompts and seeds.

Enters: the base model and, round by round, the global adapter. Leaves: `<run>/samples.png`, replaced in one step after
each row, with the rounds of its rows in the PNG's text. One thread draws while the sites train; the pipeline is made
before, since that uses torch's common random numbers. A picture that cannot be drawn never fails a run: the hub says
so and draws no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from app import files
from app.adapter import sample
from app.config import RunConfig
from app.model import Adapter

FILE = "samples.png"
MOST = 16  # rows beside the base model's
Shown = Callable[[int, Sequence[str], Sequence[Image.Image], Path], None]  # tracking.Tracker.pictures


class Gallery:
    """The pictures of one run; nothing at all where it has no sample prompts."""

    def __init__(
        self, base: Path, config: RunConfig, run: Path, shown: Shown, device: torch.device | None = None
    ) -> None:
        self.config, self.file, self.shown = config, run / FILE, shown
        self.cell = max(128, min(256, config.resolution))
        self.rows: dict[int, list[Image.Image]] = {}
        self.drawn: list[Future[int | None]] = []
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="gallery") if config.prompts else None
        if self.pool:
            try:
                self.pipe = sample.pipeline(base, config, device)
            except Exception as error:  # out of memory, above all
                self._give_up(error)
            else:
                self.draw(0, None)

    def draw(self, number: int, adapter: Adapter | None) -> None:
        """Put round `number` in the queue, where it has a row; None is the base model."""
        if self.pool and (number % math.ceil(self.config.rounds / MOST) == 0 or number == self.config.rounds):
            self.drawn.append(self.pool.submit(self._draw, number, adapter))

    def tell(self) -> None:
        """What was drawn since the last call, to the tracker; called by the thread that owns it."""
        while self.drawn and self.drawn[0].done():
            one = self.drawn.pop(0)
            if not one.cancelled() and (number := one.result()) is not None:
                self.shown(number, self.config.prompts, self.rows[number], self.file)

    def finish(self) -> None:
        """Draw what is still waiting."""
        if self.drawn:
            print("bouquet: drawing samples", flush=True)
        self.close(cancel=False)
        self.tell()

    def close(self, cancel: bool = True) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=cancel)
            self.pool = None

    def _draw(self, number: int, adapter: Adapter | None) -> int | None:
        try:
            images = sample.render(self.pipe, adapter, self.config.prompts, self.config)
            resample = Image.Resampling.LANCZOS
            self.rows[number] = [image.convert("RGB").resize((self.cell, self.cell), resample) for image in images]
            self._write()
        except Exception as error:
            self._give_up(error)
            return None
        return number

    def _write(self) -> None:
        numbers = sorted(self.rows)
        names = ["base" if number == 0 else f"round {number}" for number in numbers]
        sheet = sample.grid([self.rows[number] for number in numbers], names, self.config.prompts, cell=self.cell)
        notes = PngImagePlugin.PngInfo()
        notes.add_text("rounds", " ".join(map(str, numbers)))
        drawn = BytesIO()
        sheet.save(drawn, format="PNG", pnginfo=notes)
        files.write(self.file, drawn.getvalue())

    def _give_up(self, error: Exception) -> None:
        print(f"bouquet: no more sample pictures ({type(error).__name__})", flush=True)
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None
