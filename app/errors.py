"""Errors that a person can act on, and that are safe to send.

Enters: what was found and how to fix it. Leaves: an exception whose `str()` is public (code and headline only, because
Flower sends `str(exception)` to the hub) and whose `report()` has the private details for the local log. Either may
quote what somebody else wrote (a file's name, a fingerprint, a site's reason): none of it moves a cursor or passes for
a line of ours.
"""

from __future__ import annotations

from app import text


class BouquetError(Exception):
    """A named mistake: `code` is a heading of docs/troubleshooting.md, `headline` a public sentence without names,
    captions or paths.
    """

    def __init__(self, code: str, headline: str, *, found: str, fix: str) -> None:
        headline = text.printable(headline[: text.LONGEST])
        super().__init__(f"{code}  {headline}")
        self.code, self.headline, self.found, self.fix = code, headline, found, fix

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
