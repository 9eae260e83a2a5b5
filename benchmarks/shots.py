"""The pictures of docs/report.md: a run's report in a headless Chromium, section by section.

.venv/bin/python -m benchmarks.shots [RUN] [--out docs/report]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.browser import Browser
from bouquet.report.command import find
from bouquet.report.page import page
from bouquet.report.reading import read

SHOTS = {  # name: (the section, width of the window, dark)
    "top": ("header", 800, False),
    "pictures": ("#pictures", 800, False),
    "loss": ("#loss", 800, False),
    "joining": ("#joining", 800, False),
    "sites": ("#sites", 800, False),
    "time": ("#time", 800, False),
    "dark": ("#loss", 800, True),
    "phone": ("#pictures", 360, False),
}


def shoot(run: Path, out: Path) -> None:
    """Every picture as a PNG in `out`. The slider of "phone" stands in the middle, as a person would have moved it."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        file = Path(folder) / "report.html"
        file.write_text(page(read(run)))
        for name, (section, width, dark) in SHOTS.items():
            browser.look(width, dark=dark)
            browser.open(file)
            if name == "phone" and browser.js("!!document.getElementById('round')"):
                browser.js(
                    "(s => { s.value = Math.round(s.max / 2); s.dispatchEvent(new Event('input'))"
                    " })(document.getElementById('round'))"
                )
            if browser.js(f"!!document.querySelector({section!r})"):
                browser.picture(out / f"{name}.png", section, margin=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="latest", help="a run's folder or its id")
    parser.add_argument("--out", type=Path, default=Path("docs/report"), help="where the pictures go")
    asked = parser.parse_args()
    shoot(find(asked.run), asked.out)


if __name__ == "__main__":
    main()
