"""What a site allows a run to ask of it: the site's own limits, floors and budget against the run's config.

Signing says who wrote the code; limits say what that code may be told to do. A site gives them where no run can reach,
as `limits` of its node config (SITE_LIMITS in its .env), words separated by spaces:

  max-KEY=NUMBER, min-KEY=NUMBER         the most and the least of any numeric run-config key: max-local-steps=200
  base-models=NAME,NAME                  the base models that it lends
  no-flip                                its photos are not mirrored
  secrecy=masks                          no run whose hub sees the site's own adapter
  rank=NUMBER                            of a run of a higher rank it trains the first so many rows and columns alone,
                                         which strategy=svd can take and others refuse
  min-held-out, min-photos, min-step-images, max-runs-a-week, max-messages-a-week
                                         below; with a default where photos are private

The more photos a number is about, and the fewer numbers there are, the less it says of one photo.
Errors: TRUST-03 (a run asks for what the site does not allow), TRUST-04 (a limit that cannot be read limits
everything, never nothing), TRUST-10 (the week's budget is used up), SITE-02 (the folder has fewer photos than the
floors need).
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from app.config import RunConfig
from app.errors import SiteError

MODELS, NO_FLIP, HIDDEN, RANK = "base-models", "no-flip", "secrecy=masks", "rank"
KEYS = {f.name.replace("_", "-"): f.name for f in fields(RunConfig) if type(f.default) in (int, float)}
NUMBERS = {f"{end}-{key}": name for end in ("max", "min") for key, name in KEYS.items()}
PRIVATE = {  # what holds where photos are private, unless the site says otherwise: the value, and what it is about
    "min-held-out": (8, "photos that the validation loss is a mean of; photos are held out in groups of as many"),
    "min-photos": (8, "photos that a round trains on"),
    "min-step-images": (4, "images an optimiser step: batch-size times gradient-accumulation"),
    "min-local-steps": (4, "optimiser steps of a round"),
    "max-runs-a-week": (50, "runs that the site takes part in, in seven days"),
    "max-messages-a-week": (2000, "rounds and evaluations that it answers, in seven days"),
}
OWN = PRIVATE.keys() - NUMBERS.keys()  # of these, what no run-config key says
WEEK = 7 * 86_400  # seconds


@dataclass(frozen=True)
class Limits:
    """A site's limits as it wrote them; `bounds` by name, `models` where it names any."""

    bounds: Mapping[str, float] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    no_flip: bool = False
    secrecy: str = ""
    rank: int = 0

    @classmethod
    def read(cls, text: str) -> Limits:
        """Errors: TRUST-04."""
        bounds: dict[str, float] = {}
        models: tuple[str, ...] = ()
        secrecy, rank = "", 0
        for word in (word for word in text.split() if word != NO_FLIP):
            name, _, value = word.partition("=")
            try:
                if name == MODELS and all(value.split(",")):
                    models = tuple(value.split(","))
                elif word == HIDDEN:
                    secrecy = value
                elif name == RANK and value.isdecimal() and int(value):
                    rank = min(int(value), rank or int(value))
                elif name in NUMBERS or name in OWN:
                    tighter = min if name.startswith("max-") else max
                    bounds[name] = tighter(float(value), bounds.get(name, float(value)))
                else:
                    raise ValueError(name)
            except ValueError:
                raise _unreadable(word, name) from None
        return cls(bounds, models, NO_FLIP in text.split(), secrecy, rank)

    def check(self, config: RunConfig) -> None:
        """A run's config against what the site itself wrote, before anything is done for it. Errors: TRUST-03."""
        if self.models and config.base_model not in self.models:
            raise _not_allowed("base-model", config.base_model, f"{MODELS}={','.join(self.models)}")
        if self.no_flip and config.flip:
            raise _not_allowed("flip", config.flip, NO_FLIP)
        if self.secrecy and config.secrecy != self.secrecy:
            raise _not_allowed("secrecy", config.secrecy, f"secrecy={self.secrecy}")
        if self.lowered(config) and config.strategy != "svd":
            raise _not_allowed("lora-rank", config.lora_rank, f"{RANK}={self.rank}, which strategy=svd alone can take")
        _check(config, self.bounds)

    def lowered(self, config: RunConfig) -> int:
        """The rank that is trained here where the run's is higher, else 0."""
        return self.rank if self.rank < max((config.lora_rank, *config.other_ranks.values())) else 0

    def private(self) -> Limits:
        """These with the floors and budget of private photos, where the site has not set its own."""
        return replace(self, bounds={name: float(value) for name, (value, _) in PRIVATE.items()} | dict(self.bounds))

    def silent(self) -> Limits:
        """These where nothing is told of the photos that are held out, so that one is as good as eight."""
        return replace(self, bounds=dict(self.bounds) | {"min-held-out": 1.0})

    def floor(self, name: str) -> int:
        """A floor of PRIVATE; 1 where there is none."""
        return max(1, int(self.bounds.get(name, 1)))

    @property
    def least_photos(self) -> int:
        """Photos that a folder must have: to train on, and to hold out."""
        return self.floor("min-photos") + self.floor("min-held-out")

    def check_photos(self, config: RunConfig, trained: int, held_out: int) -> None:
        """What a round would be about, with the photos that there are. Errors: TRUST-03, SITE-02."""
        _check(config, self.bounds)
        images = config.batch_size * config.gradient_accumulation
        if images < self.floor("min-step-images"):
            raise _not_allowed(
                "batch-size times gradient-accumulation", images, f"min-step-images={self.floor('min-step-images')}"
            )
        if held_out < self.floor("min-held-out") or trained < self.floor("min-photos"):
            raise SiteError(
                "SITE-02",
                found=(
                    f"{trained} to train on and {held_out} to hold out; this site's floors are"
                    f" {self.floor('min-photos')} and {self.floor('min-held-out')}"
                ),
                fix=(
                    "add photos, or lower the floors for this site: SITE_LIMITS='min-photos=4 min-held-out=4'"
                    " (docs/security.md says what a number about so few gives away)"
                ),
            )
        if config.aspect_buckets or config.resolutions:
            images = (
                config.gradient_accumulation
            )  # a pass of a bucket that was drawn before may show photos seen before
        # a photo comes once at each resolution
        if (seen := min(trained, images * config.local_steps // len(config.sides))) < self.floor("min-photos"):
            raise _not_allowed(
                "local-steps",
                f"{config.local_steps}, which sees {seen} photos",
                f"min-photos={self.floor('min-photos')}",
            )

    def check_classes(self, count: int) -> None:
        """So many private class images: a pass is about as few of them as there are. Errors: SITE-02."""
        if count < (least := self.floor("min-photos")):
            raise SiteError(
                "SITE-02",
                found=f"{count} class images; this site's floor is {least}, as for photos",
                fix="add class images: bouquet data class-images lets the base model draw them",
            )

    def check_budget(
        self, config: RunConfig, run: str, journal: Iterable[Mapping[str, Any]], now: float | None = None
    ) -> None:
        """What this site has answered in seven days, and whether a run that begins now can end. Errors: TRUST-10."""
        since = (time.time() if now is None else now) - WEEK
        answered = [str(entry.get("run")) for entry in journal if entry.get("time", 0) > since]
        runs, needs = {*answered, run}, len(answered) + (1 if run in answered else config.rounds + 1)
        for name, used, what in (("max-runs-a-week", len(runs), "runs"), ("max-messages-a-week", needs, "messages")):
            if used > (most := self.bounds.get(name, float("inf"))):
                raise SiteError(
                    "TRUST-10",
                    found=(
                        f"{len(set(answered))} runs and {len(answered)} messages in seven days; with this one {used}"
                        f" {what}, and the site's budget is {name}={most:g}"
                    ),
                    fix=(
                        f"wait, ask for fewer rounds, or raise it: SITE_LIMITS='{name}=...', and start the SuperNode"
                        " again"
                    ),
                )


NO_LIMITS = Limits()


def check_turn(config: RunConfig, number: int, attempt: int, *, training: bool) -> None:
    """That a message is of the run that the site was asked about: a round that it has, one more for the last
    evaluation, and a try that it has. Errors: TRUST-03.
    """
    last = config.rounds if training else config.rounds + 1
    if not (1 <= number <= last and 0 <= attempt <= config.round_retries):
        raise SiteError(
            "TRUST-03",
            key="round",
            found=f"round {number}, try {attempt + 1}; the run has {config.rounds} rounds of {config.round_retries + 1}"
            " tries",
            fix="the hub asks for more than the run that it has started: ask its operator",
        )


def _check(config: RunConfig, bounds: Mapping[str, float]) -> None:
    for name, bound in bounds.items():
        if name in OWN:
            continue
        asked = getattr(config, NUMBERS[name])
        if NUMBERS[name] == "lora_rank":  # rank-pattern gives layers other ones
            asked = (max if name.startswith("max-") else min)((asked, *config.other_ranks.values()))
        if NUMBERS[name] == "resolution":
            asked = config.sides[-1 if name.startswith("max-") else 0]
        if not (asked <= bound if name.startswith("max-") else asked >= bound):  # nan allows nothing
            raise _not_allowed(name[4:], asked, f"{name}={bound:g}")


def _not_allowed(name: str, asked: object, limit: str) -> SiteError:
    return SiteError(
        "TRUST-03",
        key=repr(name),
        found=f"{name} = {asked!r}, and the site's limit is {limit}",
        fix="agree on a run that fits, or change SITE_LIMITS and start the SuperNode again",
    )


def _unreadable(word: str, name: str) -> SiteError:
    close = [
        known
        for known in difflib.get_close_matches(name, [MODELS, NO_FLIP, "secrecy", RANK, *OWN, *NUMBERS], n=1)
        if known != name
    ]
    return SiteError(
        "TRUST-04",
        found=f"{word!r} in SITE_LIMITS" + (f"; did you mean {close[0]}?" if close else ""),
        fix=(
            "write max-KEY=NUMBER or min-KEY=NUMBER for a numeric run-config key, base-models=NAME,NAME,"
            " secrecy=masks and rank=NUMBER, separated by spaces"
        ),
    )


def wants_checkpointing(env: Mapping[str, str]) -> bool:
    """Whether the site has gradient checkpointing on whatever a run says (SITE_CHECKPOINTING). Errors: CHECK-09."""
    if (value := env.get("SITE_CHECKPOINTING", "").lower()) in ("1", "true"):
        return True
    if value in ("", "0", "false"):
        return False
    raise SiteError(
        "CHECK-09",
        found=f"SITE_CHECKPOINTING={env['SITE_CHECKPOINTING']}",
        fix="set SITE_CHECKPOINTING to 1, or leave it out",
    )
