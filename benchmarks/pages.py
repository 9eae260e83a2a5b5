"""A measured table in a page of the documents, between marks that are not shown: <!-- NAME --> and <!-- /NAME -->.

Enters: the page, the marks' name, the table. Leaves: the page with it in place of the one before.
"""

from __future__ import annotations

import re
from pathlib import Path


def write(page: Path, name: str, table: str) -> None:
    """Fails where the page has no such marks."""
    first, last, before = f"<!-- {name} -->", f"<!-- /{name} -->", page.read_text()
    between = re.compile(f"{first}.*?{last}", re.DOTALL)
    assert between.search(before), f"{page} has no {first}"
    page.write_text(between.sub(lambda _: f"{first}\n{table.rstrip()}\n{last}", before))
