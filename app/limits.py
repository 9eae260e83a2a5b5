"""What a site allows a run to ask of it: the site's own limits against the run's config.

Signing says who wrote the code; limits say what that code may be told to do. A site gives them where no run can reach, as
`limits` of its node config (SITE_LIMITS in its .env): `max-KEY=NUMBER` is the most of any numeric run-config key that it
does, `base-models=NAME,NAME` the base models that it lends: `max-local-steps=200 base-models=mini,stable-diffusion-v1-5`.
Errors: TRUST-03 (a run asks for more), TRUST-04 (a limit that cannot be read limits everything, never nothing).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields

from app.config import RunConfig
from app.errors import SiteError

MODELS = "base-models"
NUMBERS = {f"max-{f.name.replace('_', '-')}": f.name for f in fields(RunConfig) if type(f.default) in (int, float)}


def check(config: RunConfig, limits: str) -> None:
    """Hold a run's config against a site's limits; none where `limits` is empty."""
    for limit in limits.split():
        key, _, value = limit.partition("=")
        asked = config.base_model if key == MODELS else getattr(config, NUMBERS.get(key, ""), None)
        if not value or asked is None:
            raise _unreadable(limit, key)
        try:
            allowed = asked in value.split(",") if key == MODELS else asked <= float(value)
        except ValueError:
            raise _unreadable(limit, key) from None
        if not allowed:
            name = "base-model" if key == MODELS else key.removeprefix("max-")
            raise SiteError(
                "TRUST-03",
                f"The run's {name!r} is not within what this site allows.",
                found=f"{name} = {asked!r}, and the site's limit is {limit}",
                fix="agree on a run that fits, or change SITE_LIMITS and start the SuperNode again",
            )


def wants_checkpointing(env: Mapping[str, str]) -> bool:
    """Whether the site trains with gradient checkpointing whatever a run says (SITE_CHECKPOINTING). Errors: CHECK-09."""
    if (value := env.get("SITE_CHECKPOINTING", "").lower()) in ("1", "true"):
        return True
    if value in ("", "0", "false"):
        return False
    raise SiteError(
        "CHECK-09",
        "A setting of the join kit is missing or wrong.",
        found=f"SITE_CHECKPOINTING={env['SITE_CHECKPOINTING']}",
        fix="set SITE_CHECKPOINTING to 1, or leave it out",
    )


def _unreadable(limit: str, key: str) -> SiteError:
    close = [word for word in difflib.get_close_matches(key, [MODELS, *NUMBERS], n=1) if word != key]
    return SiteError(
        "TRUST-04",
        "The site's own limits cannot be read.",
        found=f"{limit!r} in SITE_LIMITS" + (f"; did you mean {close[0]}?" if close else ""),
        fix="write max-KEY=NUMBER for a numeric run-config key, and base-models=NAME,NAME, separated by spaces",
    )
