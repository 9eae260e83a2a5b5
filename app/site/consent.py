"""Whether this site takes part in a run: always, or when its operator has said so, run by run.

SITE_CONSENT of the site's environment, where no run can reach: `always` (usual), `ask`, or `same`, which asks too but
for a run that equals one on which the operator has decided: the same bundle, the same base model and the same config
but for `seed` and `resume`, with the newest such decision counting. A run asks by its first message. The site
answers at once, without a thought of the photos, and remembers what was asked in `consent/RUN.json` of its cache; the
hub asks again. What is approved is what was asked then: a run whose bundle, base model or config is another by its next
message has to ask anew. A text comes back from the file with another character for each that cannot be printed, so that
what is compared are hashes, made before it was written.
Enters: a run's config, what the message says of the base model, the bundle, the operator's decision. Leaves: that file
(0600, replaced in one step), a line of the journal for each decision.
Errors: TRUST-11 (not decided yet), TRUST-12 (declined), TRUST-13 (no such run has asked), CHECK-09 (the setting).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app import audit, files, records, text
from app.config import RunConfig
from app.errors import SiteError
from app.records import entry
from app.site import journal
from app.site.limits import PRIVATE

MODES = ("always", "ask", "same")
FOLDER = "consent"  # in the cache folder
PUBLISHERS = "publishers.json"  # there too: what the SuperNode remembers of signatures (bouquet/flower/trust.py)
NEWEST = 20  # decided runs that are listed
WAITING, APPROVED, DECLINED = STATES = ("waiting", "approved", "declined")
OF_ONE_RUN = ("seed", "resume")  # what runs that are the same may differ in


@dataclass(frozen=True)
class Asked:
    """What a run asked, and what was decided."""

    run: str = entry("its id")
    bundle: str = entry("SHA-256 of its code")
    publishers: tuple[str, ...] = entry("of those whom the site pins, who signed it")
    config: dict[str, Any] = entry("the run's configuration, with _ for -")
    since: float = entry("when it asked first", "s since 1970")
    base: str = entry("the base model's fingerprint, by the hub", default="")
    limits: str = entry("the site's SITE_LIMITS", default="")
    privacy: str = entry("what the run would cost the photos, as it was known then", default="")
    state: str = entry("of the decision", choices=STATES, default=WAITING)
    decided: float | None = entry("when", "s since 1970", default=None)
    by: str = entry("who decided", default="")
    like: str = entry("the run that it equals, where that decided", default="")
    asks_sha256: str = entry("hash of all that is approved or declined, as it was asked", default="")
    kind_sha256: str = entry("the same without what runs that are the same may differ in", default="")
    version: int = entry("of this format", default=1)

    @property
    def asks(self) -> str:
        """A hash of all that is approved or declined; a file from before it was kept has the config alone."""
        return self.asks_sha256 or self._hash(self.config)

    @property
    def kind(self) -> str:
        """The same for every run that equals this one."""
        return self.kind_sha256 or self._hash({k: v for k, v in self.config.items() if k not in OF_ONE_RUN})

    def _hash(self, config: dict[str, Any]) -> str:
        what = [self.bundle, self.base, {key: str(value) for key, value in config.items()}]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def mode(env: Mapping[str, str]) -> str:
    """Errors: CHECK-09; a slip is told, never taken for `always`."""
    if (value := env.get("SITE_CONSENT", "").strip().lower() or MODES[0]) in MODES:
        return value
    fix = f"set SITE_CONSENT to {', '.join(MODES[:-1])} or {MODES[-1]}, or leave it out"
    raise SiteError("CHECK-09", found=f"SITE_CONSENT={env['SITE_CONSENT']}", fix=fix)


def asked(cached: Path, run: str, config: RunConfig, bundle: str, base: str, limits: str, privacy: str = "") -> Asked:
    """What a run asks, as the site sees it now."""
    publishers = tuple(sorted(name for name, one in _ran(cached).items() if one == bundle))
    now = Asked(run, bundle, publishers, asdict(config), round(time.time(), 3), base, limits, privacy)
    return replace(now, asks_sha256=now.asks, kind_sha256=now.kind)


def obtain(cached: Path, how: str, now: Asked) -> None:
    """Return where the run may go on; else say why not. Errors: TRUST-11, TRUST-12."""
    held = read(cached, now.run)
    if held is None or held.asks != now.asks:
        held = now
        write(cached, held)
        journal.deed(cached, "asked", run=now.run, bundle=now.bundle, asks=now.asks)
    if held.state == WAITING and how == "same":
        decided = [one for one in every(cached) if one.state != WAITING and one.kind == now.kind]
        newest = max(decided, key=lambda one: one.decided or 0, default=None)
        if newest and newest.state == APPROVED:
            held = decide(cached, held, APPROVED, like=newest.run)
    if held.state == DECLINED:
        found, fix = f"run {now.run}, by {held.by}", f"bouquet site approve {now.run}, or ./site approve {now.run}"
        raise SiteError("TRUST-12", found=found, fix=fix)
    if held.state == WAITING:
        fix = f"look at it: bouquet site runs; then bouquet site approve {now.run}, or decline; in a kit ./site runs"
        raise SiteError("TRUST-11", found=f"run {now.run}, SITE_CONSENT={how}", fix=fix)


def decide(cached: Path, what: Asked, state: str, like: str = "") -> Asked:
    """Note a decision on what was asked; the file first, so that the journal tells of none that does not count."""
    held = replace(what, state=state, decided=round(time.time(), 3), by="" if like else audit.who(), like=like)
    write(cached, held)
    more = {"like": like} if like else {}
    journal.deed(cached, state, run=held.run, bundle=held.bundle, asks=held.asks, **more)
    return held


def find(cached: Path, run: str) -> Asked:
    """What that run asked. Errors: TRUST-13."""
    if held := read(cached, run):
        return held
    fix = "bouquet site runs lists those that have; a run asks where SITE_CONSENT is ask or same"
    raise SiteError("TRUST-13", found=f"run {run}, in {cached / FOLDER}", fix=fix)


def every(cached: Path) -> list[Asked]:
    """All that asked here, oldest first."""
    held = (read(cached, file.stem) for file in (cached / FOLDER).glob("*.json"))
    return sorted((one for one in held if one), key=lambda one: one.since)


def read(cached: Path, run: str) -> Asked | None:
    """None for a file that is not there, and for one that nobody can read: what is not known is not approved."""
    try:
        held = records.read(Asked, cached / FOLDER / f"{run}.json")
    except (records.Unfit, OSError):
        return None
    return held if held.run == run else None


def write(cached: Path, what: Asked) -> None:
    (cached / FOLDER).mkdir(parents=True, exist_ok=True)
    content = json.dumps(records.told(what), indent=1, allow_nan=False) + "\n"
    files.write(cached / FOLDER / f"{what.run}.json", content, 0o600)


def _ran(cached: Path) -> dict[str, str]:
    """Publisher -> the bundle that it signed last of those that ran here."""
    try:
        known = json.loads((cached / PUBLISHERS).read_text())
        return {str(name): str(one["bundle"]) for name, one in known.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}


# --- in words ---------------------------------------------------------------------------------------------------------


def told(all_: list[Asked]) -> list[str]:
    """Those that wait in all their words, the newest of the others in a line each."""
    waiting = [one for one in all_ if one.state == WAITING]
    others = [one for one in all_ if one.state != WAITING][-NEWEST:]
    lines = [line for one in waiting for line in [*words(one), ""]]
    lines += [text.printable(state_of(one)) for one in others]
    return lines or ["no run has asked this site; a run asks where SITE_CONSENT is ask or same"]


def state_of(one: Asked) -> str:
    if one.state == WAITING:
        return f"run {one.run}  waits for your decision since {_when(one.since)}"
    by = f"as it equals run {one.like}" if one.like else f"by {one.by}"
    return f"run {one.run}  {one.state} {_when(one.decided or 0)}, {by}"


def words(one: Asked) -> list[str]:
    """What a person has to know before the decision."""
    config, others = one.config, _unusual(one.config)
    images = config["batch_size"] * config["gradient_accumulation"]
    publishers = ", ".join(one.publishers) or "nobody that this site pins"
    floors = ", ".join(f"{name} {value}" for name, (value, _) in PRIVATE.items())
    seen = "the hub sees this site's own"
    if config.get("secrecy") == "masks":
        seen = "the hub sees only its sum with other sites' (secrecy=masks)"
    numbers = "losses, counts, seconds, GPU figures"
    if one.privacy:
        numbers = "how many photos, as you let it be told, and epsilon"
    lines = [
        state_of(one),
        f"  base model  {_quoted(config['base_model'])}, fingerprint {one.base[:12] or 'not said'}",
        f"  code        bundle {one.bundle[:12]}, signed by {publishers}",
        f"  training    {config['rounds']} rounds of {config['local_steps']} steps, {images} images a step, at"
        f" {config['resolution']} pixels, an adapter of rank {config['lora_rank']}",
        f"  also        {', '.join(others) or 'everything else as usual'}",
        f"  limits      SITE_LIMITS: {one.limits or 'none of your own'}; where photos are private also {floors}, unless"
        " that says otherwise",
        f"  leaves      after each round the adapter ({config['wire_precision']}): {seen}; rounded numbers: {numbers};"
        " your site's and GPU's name, error codes",
        *([f"  privacy     {one.privacy}"] if one.privacy else []),
        "  stays       photos, captions, file names, your site's secret, this decision's file and the journal",
    ]
    return [text.printable(line[: text.LONGEST]) for line in lines]


def _unusual(config: dict[str, Any]) -> list[str]:
    """What a config has in other ways than usual and no line of its own: numbers first, that no text pushes them out
    of sight.
    """
    said = {"base_model", "rounds", "local_steps", "batch_size", "gradient_accumulation", "resolution", "lora_rank"}
    usual = asdict(RunConfig())
    found = [key for key, value in config.items() if key not in said and value != usual.get(key)]
    found.sort(key=lambda key: isinstance(config[key], str))
    return [f"{key.replace('_', '-')}={_quoted(config[key])}" for key in found]


def _quoted(value: Any) -> str:
    """A value of a config; a text in quotation marks, so that none can pass for another setting."""
    return json.dumps(text.line(value, text.LONGEST), ensure_ascii=False) if isinstance(value, str) else str(value)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
