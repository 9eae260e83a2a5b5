"""A site's own differential privacy: what it promises of each photo, and what of that is spent.

The site's operator sets SITE_PRIVACY in its environment, where no run can reach, words separated by spaces:

  epsilon=NUMBER   the most that all of this site's rounds, in all runs, may give away of one photo
  delta=NUMBER     with which chance that may fail; below 1 / photos; 1e-5 unless it is said
  clip=NUMBER      the most that one photo's gradient is long in a step; 0.05 unless it is said
  noise=NUMBER     noise of a step, in units of clip; 1 unless it is said; a run may ask for more (`dp-noise`)
  photos=NUMBER    what the hub is told in place of the number of photos, so that this does not follow from them

or `off`. Each round is written down in `privacy.jsonl` of the site's cache before a photo is looked at: a round that is
killed has been paid, and one that is asked for again is paid again. The file is a chain like the journal
(app/audit.py), and the journal has a line for each payment as well: where the file is gone, cut or changed, nothing is
trained. What left without noise, before there was a promise or while it was off, nobody can pay for: epsilon is of what
was sent under the promise, and how much else was sent is said beside it.
Enters: SITE_PRIVACY, the cache, a run's config. Leaves: the terms of a round, once they are paid.
Errors: TRUST-15 (it is spent), TRUST-16 (SITE_PRIVACY cannot be read, or was taken away), TRUST-17 (the file), TRUST-18
(a run that cannot be trained so).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from app import audit, files
from app.config import RunConfig
from app.errors import SiteError
from app.site import accountant, journal
from app.site.accountant import Steps, Terms

FILE, LOCK = "privacy.jsonl", "privacy.lock"  # in the cache folder
SPENT = "spent"  # what such a deed is called
OFF = "off"


@dataclass(frozen=True)
class Promise:
    """SITE_PRIVACY, read."""

    epsilon: float
    delta: float = 1e-5
    clip: float = 0.05
    noise: float = 1.0
    photos: int = 0

    @classmethod
    def read(cls, text: str) -> Promise | None:
        """None where the site promises nothing. Errors: TRUST-16; a slip is told, never taken for nothing."""
        if text.strip() in ("", OFF):
            return None
        kinds = {field.name: int if field.name == "photos" else float for field in fields(cls)}
        held: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            try:
                if name in held:
                    raise ValueError(name)
                held[name] = kinds[name](value)
            except (KeyError, ValueError):
                raise _unreadable(f"{word!r} in SITE_PRIVACY") from None
            if not (0 < held[name] < math.inf and (name != "delta" or held[name] < 1)):
                raise _unreadable(
                    f"{word!r} in SITE_PRIVACY: {name} must be above 0{' and below 1' * (name == 'delta')}"
                )
        if "epsilon" not in held:
            raise _unreadable(f"SITE_PRIVACY={text[:200]!r} says no epsilon")
        return cls(**held)

    def terms(self, config: RunConfig, photos: int) -> Terms:
        """Of a round over so many photos, as the hub is told of them. Errors: TRUST-16, TRUST-18."""
        check(config, self)
        told = self.photos or photos
        if self.delta * told >= 1:
            raise _unreadable(f"delta={self.delta:g} with {told} photos: one of them may be given away whole")
        return Terms(
            told, config.batch_size * config.gradient_accumulation, max(self.noise, config.dp_noise), self.clip
        )


def of(env: Mapping[str, str], cached: Path) -> Promise | None:
    """The site's. Errors: TRUST-16, also where it has paid before and no longer says a word."""
    text = env.get("SITE_PRIVACY", "")
    if not text.strip() and (file := _paid_in(cached)):
        raise _unreadable(f"SITE_PRIVACY is empty, and {file} says that this site has trained with it")
    return Promise.read(text)


def check(config: RunConfig, promise: Promise | None) -> None:
    """Whether a run can be trained so. Errors: TRUST-18."""
    if promise is None and config.dp_noise:
        why, fix = "it asks for noise, and this site has set none", "set SITE_PRIVACY='epsilon=8 delta=1e-5 clip=0.05'"
        raise _cannot(why, f"dp-noise = {config.dp_noise:g}, and SITE_PRIVACY is empty", fix)
    if promise and config.prior_loss_weight:
        why, fix = "class images are no part of what is promised", "run with prior-loss-weight=0"
        raise _cannot(why, f"prior-loss-weight = {config.prior_loss_weight:g}", fix)
    if promise and config.resolutions:
        why, fix = "a photo would be in a step once for each resolution", "run with resolutions=''"
        raise _cannot(why, f"resolutions = {config.resolutions!r}", fix)


def spent(cached: Path) -> list[dict[str, Any]]:
    """Every payment, oldest first. Errors: TRUST-17."""
    told = len(_in_journal(cached))
    held = [entry for entry in _entries(cached / FILE, strict=True) if entry.get("did") == SPENT]
    try:
        steps = [_steps(entry) for entry in held]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _lost(f"{cached / FILE}: a payment cannot be read ({type(error).__name__})") from None
    if any(not (0 < one.rate <= 1 and one.noise > 0 and one.number > 0) for one in steps):
        raise _lost(f"{cached / FILE}: a payment is of impossible numbers")
    if len(held) < told:
        raise _lost(f"{cached / FILE} has {len(held)} payments, {cached / journal.FILE} {told}")
    return held


def epsilon(cached: Path, delta: float, *more: Steps) -> float:
    """What has been given away of one photo, and would be with `more`. Errors: TRUST-17."""
    return accountant.epsilon([*map(_steps, spent(cached)), *more], delta)


def without_noise(cached: Path) -> int:
    """Rounds whose adapter left and was not paid for, by the journal: epsilon is not of them. Errors: TRUST-17."""
    sent = Counter((entry.get("run"), entry.get("round")) for entry in journal.read(cached) if entry.get("sent"))
    paid = Counter((entry.get("run"), entry.get("round")) for entry in spent(cached))
    return (sent - paid).total()


def check_room(cached: Path, promise: Promise, terms: Terms, config: RunConfig, run: str, number: int) -> None:
    """Whether the round can be paid; for a run that pays here for the first time, all its rounds from there on.

    Errors: TRUST-15, TRUST-17.
    """
    begun = any(entry.get("run") == run for entry in spent(cached))
    rounds = 1 if begun else max(1, config.rounds - number + 1)
    now = epsilon(cached, promise.delta)
    needed = epsilon(cached, promise.delta, terms.steps(rounds * config.local_steps))
    if needed > promise.epsilon:
        what = "round" if begun else "run"
        raise SiteError(
            "TRUST-15",
            found=(
                f"epsilon {now:.3g} of {promise.epsilon:g} is spent (delta {promise.delta:g}), and with this {what}"
                f" it would be {needed:.3g}"
            ),
            fix=(
                "ask for fewer rounds or local-steps, a smaller batch-size or a larger dp-noise: bouquet site privacy"
                " says what they cost; a larger epsilon gives more away of every photo, also of those that were"
                " trained on before"
            ),
        )


def spend(cached: Path, promise: Promise, terms: Terms, config: RunConfig, run: str, number: int) -> float:
    """Pay for a round, on the disk before this returns; what is spent with it. Errors: TRUST-15, TRUST-17, OSError."""
    with _alone(cached):
        check_room(cached, promise, terms, config, run, number)
        steps = terms.steps(config.local_steps)
        total = epsilon(cached, promise.delta, steps)
        facts = {
            "run": run,
            "round": number,
            "steps": steps.number,
            "rate": steps.rate,
            "noise": steps.noise,
            "photos": terms.photos,
            "epsilon": round(total, 6),
            "delta": promise.delta,
        }
        if not (cached / FILE).exists():
            os.close(os.open(cached / FILE, os.O_WRONLY | os.O_CREAT, 0o600))
            files.sync(cached)
        audit.append(cached / FILE, did=SPENT, **facts)
        journal.deed(cached, SPENT, **facts)
    return total


def outlook(cached: Path, promise: Promise, config: RunConfig) -> str:
    """What a run would cost, in words, with as many photos as were told the last time. Errors: TRUST-17."""
    paid = spent(cached)
    photos = promise.photos or (int(paid[-1]["photos"]) if paid else 0)
    before = f"; beside that {count} rounds left without noise" if (count := without_noise(cached)) else ""
    if not photos:
        most = f"at most epsilon {promise.epsilon:g} of each photo{before}"
        return f"{most}; bouquet site privacy says what this run costs"
    steps = promise.terms(config, photos).steps(config.rounds * config.local_steps)
    now, then = epsilon(cached, promise.delta), epsilon(cached, promise.delta, steps)
    return (
        f"epsilon {now:.2f} of {promise.epsilon:g} is spent of each photo (delta {promise.delta:g}), and"
        f" {then:.2f} by the run's end{before}"
    )


def told(cached: Path, promise: Promise, terms: Terms) -> dict[str, int | float]:
    """All numbers that leave with a round; epsilon is of what was sent under the promise. Errors: TRUST-17."""
    spent_by_now = epsilon(cached, promise.delta)
    return {
        "num-examples": terms.photos,
        "dp-epsilon": spent_by_now,
        "dp-delta": promise.delta,
        "dp-noise": terms.noise,
    }


@contextlib.contextmanager
def _alone(cached: Path) -> Iterator[None]:
    """One process at a time looks and pays."""
    cached.mkdir(parents=True, exist_ok=True)
    target = os.open(cached / LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        audit.lock(target)
        yield
    finally:
        os.close(target)


def _in_journal(cached: Path) -> list[audit.Entry]:
    """Every payment that the journal knows of. Errors: TRUST-17."""
    return [entry for entry in _entries(cached / journal.FILE, strict=False) if entry.get("did") == SPENT]


def _paid_in(cached: Path) -> Path | None:
    """The file that says that this site has paid before, if any does: the one may be lost without the other."""
    if (cached / FILE).exists():
        return cached / FILE
    return cached / journal.FILE if _in_journal(cached) else None


def _entries(file: Path, strict: bool) -> tuple[audit.Entry, ...]:
    """A log's lines; none where there is no file. strict: it has to be as it was written. Errors: TRUST-17."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise _lost(f"{file}: {type(error).__name__}") from None
    held = audit.check(content)
    if strict and (wrong := (*held.faults, *held.torn)):
        raise _lost(f"{file}: {wrong[0]}")
    return held.entries


def _steps(entry: audit.Entry) -> Steps:
    return Steps(float(entry["rate"]), float(entry["noise"]), int(entry["steps"]))


def _unreadable(found: str) -> SiteError:
    fix = (
        "write SITE_PRIVACY='epsilon=8 delta=1e-5 clip=0.05', with noise= and photos= where you want them, or off for"
        " none at all, and start the SuperNode again"
    )
    return SiteError("TRUST-16", found=found, fix=fix)


def _lost(found: str) -> SiteError:
    fix = (
        "take the file from a backup that is not older than the last round; where nobody knows what was spent, it is"
        " gone: these photos take no more part, or their owners decide anew (then remove the cache)"
    )
    return SiteError("TRUST-17", found=found, fix=fix)


def _cannot(why: str, found: str, fix: str) -> SiteError:
    return SiteError("TRUST-18", why=why, found=found, fix=fix)
