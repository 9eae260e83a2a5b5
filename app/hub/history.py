"""What the hub writes about a run: history.json, a round's metrics.json, status.json, and an adapter's provenance.json;
docs/records.md has every field.

Enters: what the run knows, or a file of any run. Leaves: the file, or the record. Errors: REPORT-02 (it is no such
record), REPORT-05 (a newer version wrote it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from app import files, records, text
from app.errors import BouquetError
from app.records import entry

VERSION = 1
STATES = ("running", "finished", "failed")
FILE, STATUS, PROVENANCE = "history.json", "status.json", "provenance.json"
Kind = TypeVar("Kind", "History", "Status", "Provenance")


@dataclass(frozen=True)
class Refused:
    """A site whose reply did not count, or did not come."""

    site: str = entry("the site's name")
    reason: str = entry("code and public sentence")


@dataclass(frozen=True)
class Part:
    """A site's part in a round: its numbers as it sent them, and what the hub made of them. One flat object in the
    file.
    """

    numbers: dict[str, float] = entry("every number that the site sent, by its name in app/metrics.py", key="*")
    weight: float | None = entry("images that it counted for in the mean", "images", default=None)
    bound: str = entry("why those are fewer than it says that it has", key="weight-bound", default="")
    norm: float | None = entry("length of its update", key="update-norm", default=None)
    gpu: str = entry("its GPU's name; empty for a CPU", default="")
    left_out: int = entry("numbers that it sent and the hub did not keep", "numbers", key="left-out", default=0)
    rank: int | None = entry("rank that it trained, where it chose one below the run's", default=None)

    @property
    def images(self) -> float | None:
        """How many it says that it has."""
        return self.numbers.get("num-examples")

    @property
    def counted(self) -> float:
        """How many it counted for; as many as it says where the hub noted nothing."""
        return self.weight if self.weight is not None else self.images or 0

    def told(self) -> dict[str, Any]:
        ours: dict[str, Any] = {"weight": self.weight, "update-norm": self.norm, "gpu": self.gpu, "rank": self.rank}
        more = {"weight-bound": self.bound, "left-out": self.left_out}
        known = {key: value for key, value in ours.items() if value is not None}
        return self.numbers | known | {key: value for key, value in more.items() if value}

    @classmethod
    def taken(cls, value: Mapping[str, Any]) -> Part:
        """What in it is none of ours and no number is passed over."""

        def number(key: str) -> float | None:
            held = value.get(key)
            return held if type(held) in (int, float) else None

        def words(key: str) -> str:
            held = value.get(key)
            return held if isinstance(held, str) else ""

        ours = ("weight", "weight-bound", "update-norm", "gpu", "left-out", "rank")
        numbers = {key: held for key, held in value.items() if key not in ours and type(held) in (int, float)}
        left_out, norm, rank = int(number("left-out") or 0), number("update-norm"), int(number("rank") or 0) or None
        return cls(numbers, number("weight"), words("weight-bound"), norm, words("gpu"), left_out, rank)


@dataclass(frozen=True)
class Round:
    """A round that is done; alone in the round's own folder, too, as metrics.json."""

    round: int = entry("its number, from 1")
    started_from: str = entry("SHA-256 of the adapter that the sites got")
    adapter: str = entry("SHA-256 of the adapter that came out")
    seconds: float = entry("from the first message to the whole adapter", "s")
    sites: dict[str, Part] = entry("whoever took part, by name")
    train_loss: float | None = entry("mean training loss of who tells it, by the images that count", default=None)
    adapters: dict[str, str] = entry("SHA-256 of each accepted reply's adapter, by site", default={})
    refused: tuple[Refused, ...] = entry("whose reply did not count, in every try", default=())
    average: str = entry("with ema-decay, SHA-256 of the moving average that this round left", default="")
    undecided: tuple[str, ...] = entry("sites whose operator had not decided on the run by its end", default=())
    declined: tuple[str, ...] = entry("sites whose operator has declined the run", default=())
    aggregation_error: float | None = entry(
        "what averaging A and B apart loses, as a share of the mean of the products B·A", default=None
    )
    version: int = entry("of this format", default=VERSION)


@dataclass(frozen=True)
class Validation:
    """The loss of a global adapter on the photos that the sites hold out."""

    after_round: int = entry("rounds that it was trained, from 0")
    weighted: float = entry("mean over the sites that tell it, by the images that count")
    sites: dict[str, float] = entry("by site")


@dataclass(frozen=True)
class Base:
    """The base model."""

    name: str = entry("as run-config names it")
    fingerprint: str = entry("SHA-256 over its files")


@dataclass(frozen=True)
class Resumed:
    """Where a run went on from."""

    run: str = entry("that run's id")
    after_round: int = entry("rounds taken over from it", "rounds")


@dataclass(frozen=True)
class Begun:
    """The LoRA file that a run began with."""

    file: str = entry("its name")
    adapter: str = entry("SHA-256 of the adapter made of it")


@dataclass(frozen=True)
class History:
    """A run: history.json, written anew after every round."""

    run: str = entry("the run's id")
    state: str = entry("running, finished or failed", choices=STATES)
    config: dict[str, Any] = entry("the run's configuration, with _ for -", default={})
    base: Base | None = entry("the base model", default=None)
    versions: dict[str, str] = entry("of the hub's libraries, by name", default={})
    rounds: tuple[Round, ...] = entry("every round that is done, in order", default=())
    validation: tuple[Validation, ...] = entry("before the first round and after each", default=())
    seconds: float | None = entry("since the run began", "s", default=None)
    error: str = entry("why it failed: code and public sentence", default="")
    started_from: Begun | None = entry("where it began with a LoRA file", default=None)
    resumed: Resumed | None = entry("where it went on from another run", default=None)
    refused_final_evaluation: tuple[Refused, ...] = entry("who did not count in the last evaluation", default=())
    no_final_evaluation: str = entry("why there was no last evaluation", default="")
    version: int = entry("of this format", default=VERSION)


@dataclass(frozen=True)
class Status:
    """What a run is doing now: status.json, written at every step of a round."""

    run: str = entry("the run's id", default="")
    state: str = entry("waiting for sites, waiting (for replies), working; then as the history has it", default="")
    kind: str = entry("what the sites are asked for: train or evaluate", default="")
    round: int | None = entry("the round in progress", default=None)
    attempt: int = entry("tries of it that failed", "tries", default=0)
    since: float | None = entry("when the wait began", "s since 1970", default=None)
    deadline: float | None = entry("when it ends", "s since 1970", default=None)
    replied: tuple[str, ...] = entry("sites whose reply is there", default=())
    missing: tuple[str, ...] = entry("sites that are waited for", default=())
    took: dict[str, float] = entry("of those, how long the last reply took, by site", "s", default={})
    refused: tuple[Refused, ...] = entry("whose reply did not count, in this try", default=())
    adapter: str = entry("folder of the last whole adapter", default="")
    error: str = entry("why the run failed", default="")
    time: float = entry("when this was written", "s since 1970", default=0.0)
    undecided: tuple[str, ...] = entry(
        "sites whose operator has not decided on the run; they are asked again", default=()
    )
    declined: tuple[str, ...] = entry("sites whose operator has declined the run", default=())
    version: int = entry("of this format", default=VERSION)


@dataclass(frozen=True)
class Given:
    """What a site gave to an adapter."""

    images: int | None = entry("images that it says that it has", "images", default=None)
    counted: int | None = entry("images that it counted for in the mean of its last round", "images", default=None)


@dataclass(frozen=True)
class Spent:
    """What was given away of each photo of sites with differential privacy, by their own account."""

    sites: int = entry("how many of them had it in every round")
    of: int = entry("how many took part")
    epsilon: float = entry("the most that one of them has spent, on all that it has sent under its promise")
    delta: float = entry("the largest of theirs")


@dataclass(frozen=True)
class Personal:
    """How a site has trained a run's adapter on, at home."""

    site: str = entry("the site's name; as published, a number")
    steps: int = entry("steps that it took there", "steps")
    started_from: str = entry("SHA-256 of the run's adapter")


@dataclass(frozen=True)
class Provenance:
    """What an adapter was made of: provenance.json beside its files, which goes wherever they go."""

    run: str = entry("the run's id", default="")
    made: str = entry("when, in UTC", default="")
    adapter_sha256: str = entry("of its numbers", default="")
    base: Base | None = entry("the base model", default=None)
    rounds: int | None = entry("rounds that it was trained", default=None)
    sites: dict[str, Given] = entry("whoever took part in any round, by name; as published, by a number", default={})
    images: int | None = entry("of all these sites, by their word", "images", default=None)
    config: dict[str, Any] = entry("the run's configuration, with _ for -", default={})
    versions: dict[str, str] = entry("of the hub's libraries, by name", default={})
    privacy: Spent | None = entry("where sites had differential privacy", default=None)
    personal: Personal | None = entry("where a site has trained it on, at home", default=None)
    version: int = entry("of this format", default=VERSION)


UNKNOWN = Provenance()  # of an adapter that has none


def read(path: Path) -> History:
    """A run's history.json. Errors: REPORT-02, REPORT-05."""
    return _read(History, path)


def read_status(path: Path) -> Status:
    """A run's status.json. Errors: REPORT-02, REPORT-05."""
    return _read(Status, path)


def up_to(done: int, earlier: History, written: Sequence[Round]) -> tuple[tuple[Round, ...], tuple[Validation, ...]]:
    """The rounds, and the losses of what arrived in them, of a run that goes on after round `done`. One that was
    killed, or found no room, between a round and its history has it in the round's own folder alone (`written`).
    """
    known = {entry.round for entry in earlier.rounds}
    missing = [entry for entry in written if entry.round not in known]
    rounds = sorted((*earlier.rounds, *missing), key=lambda entry: entry.round)
    heard = {entry.after_round for entry in earlier.validation}
    found = [
        one for entry in missing if entry.round - 1 not in heard and (one := arrived(entry.round - 1, entry.sites))
    ]
    validation = sorted((*earlier.validation, *found), key=lambda entry: entry.after_round)
    return (
        tuple(entry for entry in rounds if entry.round <= done),
        tuple(entry for entry in validation if entry.after_round < done),
    )


def arrived(after: int, sites: Mapping[str, Part]) -> Validation | None:
    """What the sites said of the adapter that arrived after so many rounds; None where nobody tells it."""
    if (mean := weighted(sites, "validation-loss")) is None:
        return None
    losses = {
        name: part.numbers["validation-loss"] for name, part in sites.items() if "validation-loss" in part.numbers
    }
    return Validation(after, mean, losses)


def weighted(sites: Mapping[str, Part], name: str) -> float | None:
    """Mean of a number over who tells it, by the images that each counted for; None where nobody does."""
    telling = [part for part in sites.values() if name in part.numbers]
    images = sum(part.counted for part in telling)
    return sum(part.numbers[name] * part.counted for part in telling) / images if images else None


def read_provenance(path: Path) -> Provenance:
    """An adapter's provenance.json. Errors: REPORT-02, REPORT-05."""
    return _read(Provenance, path)


def write(path: Path, record: History | Status | Provenance) -> None:
    """In one step. Errors: OSError; ValueError for a number that is none."""
    files.write_json(path, records.told(record))


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return records.read(kind, path)
    except (records.Unfit, OSError) as error:
        raise refusal(error, str(path)) from None


def refusal(error: Exception, file: str) -> BouquetError:
    """The named error of a file that is no such record."""
    if isinstance(error, records.Unfit) and error.newer:
        fix = "update this program to the hub's version"
        return BouquetError("REPORT-05", found=text.line(f"{file}: {error}"), fix=fix)
    why = error.strerror if isinstance(error, OSError) else error
    fix = "copy the run's folder again from the hub's shared volume"
    return BouquetError("REPORT-02", found=text.line(f"{file}: {why}"), fix=fix)
