"""samples.png cut back into its pictures, each as a data: URI, so that the page needs no other file.

Enters: the sheet that app/adapter/sample.py draws (a row for the base and each kept round, a column for each prompt)
and the run's config. Leaves: for each prompt the base's picture and one for each round. A sheet of another shape is
shown whole, and so is what a site drew for the comparison (`unpacked`).
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from app.errors import BouquetError

# pixels: between pictures, a line of a column's name, above and below it (app/adapter/sample.py)
GAP, LINE, HEAD = 6, 17, 10
LINES = 10  # most lines of a column's name
LARGEST = 8192  # pixels of a side
MOST = 40  # rounds that the page embeds; of more, evenly chosen ones


def cut(sheet: Path, config: dict[str, Any], last: int) -> dict[str, Any] | None:
    """None where there is no sheet; {"whole": uri} where its shape is unknown; else {"rounds": [0, 1, ...], "prompts":
    [...]}.

    Round 0 is the base. The sheet's own text says which rounds it has; one without holds the base and the newest up to
    `last`. Each prompt is {"text": str, "pictures": [uri, ...]}, in the order of the rounds.
    """
    if not sheet.is_file():
        return None
    with Image.open(sheet) as opened:
        image, drawn = opened.convert("RGB"), [int(number) for number in opened.info.get("rounds", "").split()]
    prompts = [text.strip() for text in config.get("sample_prompts", "").split("|") if text.strip()]
    if not (shape := layout(image.size, prompts, config.get("resolution", 64))):
        return {"whole": uri(image), "width": image.width, "height": image.height}
    cell, left, top, rows = shape
    rounds = drawn if len(drawn) == rows else [0, *range(last - rows + 2, last + 1)]
    shown = range(rows) if rows <= MOST else sorted({0, *(round(1 + i * (rows - 2) / (MOST - 1)) for i in range(MOST))})

    def box(row: int, column: int) -> tuple[int, int, int, int]:
        x, y = left + column * (cell + GAP), top + row * (cell + GAP)
        return x, y, x + cell, y + cell

    pictures = [[uri(image.crop(box(row, column))) for row in shown] for column in range(len(prompts))]
    found = [{"text": text, "pictures": uris} for text, uris in zip(prompts, pictures, strict=True)]
    return {"rounds": [rounds[row] for row in shown], "prompts": found, "cell": cell, "left_out": rows - len(shown)}


def layout(size: tuple[int, int], prompts: list[str], resolution: int) -> tuple[int, int, int, int] | None:
    """(side of a picture, left edge, top edge, rows) of a sheet of that size; None when it does not add up."""
    if not prompts:
        return None
    cell = max(128, min(256, resolution))
    left = size[0] - len(prompts) * (cell + GAP)
    for lines in range(1, LINES + 1):  # how many fits once alone: 17 and the height of a row share no short multiple
        rows, rest = divmod(size[1] - HEAD - LINE * lines, cell + GAP)
        if left > 0 and rows > 0 and rest == 0:
            return cell, left, HEAD + LINE * lines, rows
    return None


def unpacked(text: str) -> Image.Image | None:
    """The picture that a site let come along in worth.json, base64 of a PNG; None where there is none. Errors:
    REPORT-04.
    """
    if not text:
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as opened:
            if max(opened.size) > LARGEST:
                raise ValueError(f"{opened.width} by {opened.height} pixels")
            return opened.convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BouquetError(
            "REPORT-04",
            found=f"a site's picture is no PNG of at most {LARGEST} by {LARGEST} pixels ({type(error).__name__})",
            fix="take the .png from beside that site's column, and collect again",
        ) from error


def uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=92, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
