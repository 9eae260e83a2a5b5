"""Errors that a person can act on, and that are safe to send.

Enters: what was found and how to fix it. Leaves: an exception whose `str()` is public (code and headline only, because
Flower sends `str(exception)` to the hub) and whose `report()` has the private details for the local log. Either may
quote what somebody else wrote (a file's name, a fingerprint, a site's reason): none of it moves a cursor or passes for
a line of ours.
"""

from __future__ import annotations

from app import text
from app.codes import HEADLINES


def public(code: str, **facts: object) -> str:
    """The code and its sentence, with the facts that it tells; one line of what may go out."""
    return f"{code}  {_headline(code, facts)}"


def _headline(code: str, facts: dict[str, object]) -> str:
    return text.printable(HEADLINES[code].format(**facts)[: text.LONGEST])


class BouquetError(Exception):
    """A named mistake: `code` is one of codes.HEADLINES, whose sentence takes the `facts`; none is a caption or a
    path.
    """

    def __init__(self, code: str, *, found: str, fix: str, **facts: object) -> None:
        self.code, self.headline, self.found, self.fix = code, _headline(code, facts), found, fix
        super().__init__(f"{code}  {self.headline}")

    def report(self) -> str:
        """The whole message, for this machine's log only: code, found, fix, help."""
        return (
            f"{self.code}  {self.headline}\n"
            f"  found  {text.block(self.found, indent=9)}\n"
            f"  fix    {text.block(self.fix, indent=9)}\n"
            f"  help   docs/troubleshooting.md#{self.code.lower()}"
        )


class ConfigError(BouquetError):
    """The run configuration is wrong (CONFIG-..)."""


class ModelError(BouquetError):
    """The base model is missing, unknown or not the one the hub uses (MODEL-..)."""


class SiteError(BouquetError):
    """A site's data or set-up is wrong (SITE-..)."""


class HubError(BouquetError):
    """The hub cannot go on: too few sites, no valid reply, no room (HUB-..)."""


class AdapterError(BouquetError):
    """An adapter does not fit: keys, shapes, types or hash (ADAPTER-..)."""
