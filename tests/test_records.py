"""Records on disk: what is written is read again, what was written before is read too, and nothing else is; and the
page that tells of every field.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from app import records
from app.errors import BouquetError
from app.hub import history
from app.hub.history import (
    Base,
    Begun,
    Given,
    History,
    Part,
    Personal,
    Provenance,
    Refused,
    Resumed,
    Round,
    Spent,
    Status,
    Validation,
)
from bouquet import ROOT
from bouquet.adapter.alone import Alone
from bouquet.adapter.membership import Attack, Membership
from bouquet.report import comparison, memorisation
from bouquet.report.comparison import Column, Measured, Worth
from bouquet.report.memorisation import Distances, Memory, SiteMemory
from bouquet.report.page import page
from bouquet.report.reading import read
from tests.kit.runs import compared, written
from tests.kit.runs import history as a_history

PAGE_RECORDS = (
    *(History, Base, Round, Part, Validation, Refused, Resumed, Begun, Status, Provenance, Given, Spent, Personal),
    *(Worth, Measured, Column, Alone, Memory, Distances, SiteMemory, Membership, Attack),
)
PART = Part({"num-examples": 40, "train-loss": 0.5, "seconds-train": 9.0}, 30, "largest-share", 1.5, "NVIDIA L4", 2)
LATE = Refused("lily", "HUB-03  Late.")
ROUND = Round(1, "a" * 64, "b" * 64, 12.5, {"rose": PART}, 0.25, {"rose": "c" * 64}, (LATE,))
WHOLE = History(
    run="7",
    state="failed",
    config={"rounds": 3, "base_model": "mini"},
    base=Base("mini", "d" * 64),
    versions={"torch": "2.13.0"},
    rounds=(ROUND,),
    validation=(Validation(0, 0.5, {"rose": 0.5}), Validation(1, 0.25, {"rose": 0.25})),
    seconds=61.0,
    error="HUB-02  Too few valid replies.",
    started_from=Begun("flowers.safetensors", "e" * 64),
    resumed=Resumed("6", 1),
    refused_final_evaluation=(LATE,),
    no_final_evaluation="HUB-02  Too few valid replies.",
)
NEAR = Distances(12, "latents", (0.5, 0.9), (0.6,), "7", "a" * 64, 42)
# history.json as the version before wrote it, which knew no version
BEFORE = """{
 "run": "7", "state": "finished", "config": {"rounds": 1, "base_model": "mini"},
 "base": {"name": "mini", "fingerprint": "dd"}, "versions": {"torch": "2.13.0"},
 "rounds": [{"round": 1, "started_from": "aa", "adapter": "bb", "train_loss": 0.25, "seconds": 12.5,
   "sites": {"rose": {"num-examples": 40, "train-loss": 0.5, "validation-loss": 0.5, "seconds-train": 9.0,
     "update-norm": 1.5, "weight": 30, "gpu": "NVIDIA L4", "weight-bound": "largest-share", "left-out": 2}},
   "adapters": {"rose": "cc"}, "refused": [{"site": "lily", "reason": "HUB-03  Late."}]}],
 "validation": [{"after_round": 0, "weighted": 0.5, "sites": {"rose": 0.5}}],
 "refused_final_evaluation": [], "seconds": 61.0
}"""


def table(kind: type) -> str:
    """A record's fields as docs/records.md tells of them."""
    rows = ["| field | type | unit | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        shown = str(field.type).replace(" | None", "").replace(", ...", "").replace("tuple[", "list[")
        meaning = field.metadata["meaning"] + ("" if required or field.name == "version" else "; may be absent")
        rows.append(f"| `{records.name(field)}` | {shown} | {field.metadata['unit']} | {meaning} |")
    return "\n".join(rows)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        WHOLE,
        History("7", "running"),
        ROUND,
        Status(
            "7", "waiting", "train", 2, 1, 1.5, 2.5, ("rose",), ("lily",), {"lily": 48.3}, (), "round-0001", "", 3.0
        ),
        Worth(
            (1, 2), {"rose": Measured(20, {"alone": (0.2, 0.2), "federated": (0.1, 0.1)}, None, "cGljdHVyZQ==")}, "7", 6
        ),
        Column("rose", (1,), 20, {"alone": (0.2,), "federated": (0.1,)}, None, 6, {"lily": (0.3,)}),
        Alone("rose", {"1": "a" * 64}),
        Provenance("7", personal=Personal("rose", 6, "a" * 64)),
        Membership("rose", "7", "a" * 64, 200, 60, {"loss": Attack(0.6, 0.5, 0.7, 0.02), "pia": Attack(0.5, 0.4, 0.6)}),
        Column("rose", (1,), 20, {"alone": (0.2,), "federated": (0.1,)}, {"alone": (0.5,), "federated": (0.9,)}, 6),
        Provenance("7", "2026-11-28T20:00:00Z", "a" * 64, Base("mini", "d" * 64), 3, {"rose": Given(40, 30)}, 40),
        Memory({"rose": NEAR}, "7"),
        SiteMemory(**vars(NEAR), site="rose"),
    ],
    ids=lambda record: f"{type(record).__module__.rpartition('.')[2]}-{type(record).__name__}",
)
def test_what_is_written_is_read_again(record):
    assert records.parse(type(record), json.dumps(records.told(record)).encode()) == record


def test_the_file_has_the_names_that_operators_programs_know_and_a_version():
    told = records.told(WHOLE)
    assert told["version"] == 1 and set(told) == {records.name(field) for field in dataclasses.fields(History)}
    assert told["rounds"][0]["sites"]["rose"] == {
        "num-examples": 40, "train-loss": 0.5, "seconds-train": 9.0,
        "weight": 30, "weight-bound": "largest-share", "update-norm": 1.5, "gpu": "NVIDIA L4", "left-out": 2,
    }  # fmt: skip
    assert told["rounds"][0]["refused"] == [{"site": "lily", "reason": "HUB-03  Late."}]
    assert {"error", "resumed", "started_from"} & set(records.told(History("7", "running"))) == set()


def test_a_history_of_the_version_before_is_read_and_written_with_a_version(tmp_path):
    file = tmp_path / "history.json"
    file.write_text(BEFORE)
    found = history.read(file)
    [part] = found.rounds[0].sites.values()
    assert (part.images, part.counted, part.bound, part.norm, part.gpu, part.left_out) == (
        40, 30, "largest-share", 1.5, "NVIDIA L4", 2,
    )  # fmt: skip
    assert (found.base, found.rounds[0].adapters, found.seconds) == (Base("mini", "dd"), {"rose": "cc"}, 61.0)
    history.write(file, found)
    again = json.loads(file.read_text())
    assert again.pop("version") == 1 and again["rounds"][0].pop("version") == 1
    assert again["rounds"][0].pop("undecided") == again["rounds"][0].pop("declined") == []  # nobody could say so
    assert again == json.loads(BEFORE)


def test_a_comparison_of_the_version_before_is_read(tmp_path):
    told = {"seeds": [1], "steps": 3, "sites": {"rose": compared([0.2], [0.1])}}
    (tmp_path / "worth.json").write_text(json.dumps(told))
    assert comparison.read(tmp_path / "worth.json").sites["rose"].loss["federated"] == (0.1,)
    (tmp_path / "worth.json").write_text(json.dumps(told | {"version": 1}))  # as the first with a version
    found = comparison.read(tmp_path / "worth.json")
    assert (found.version, found.sites["rose"].others) == (2, None)
    column = {"site": "rose", "seeds": [1], "version": 1} | told["sites"]["rose"]
    (tmp_path / "rose.worth.json").write_text(json.dumps(column))
    assert comparison.read_column(tmp_path / "rose.worth.json").others is None
    assert comparison.read(tmp_path / "nothing.json") is None


def test_a_provenance_and_distances_of_the_version_before_are_read(tmp_path):
    told = {"run": "7", "base": {"name": "mini", "fingerprint": "dd"}, "rounds": 1, "sites": {"rose": {"images": 40}}}
    (tmp_path / "provenance.json").write_text(json.dumps(told))
    found = history.read_provenance(tmp_path / "provenance.json")
    assert (found.base, found.sites, found.adapter_sha256) == (Base("mini", "dd"), {"rose": Given(40)}, "")
    column = {"site": "rose", "photos": 12, "space": "latents", "samples": [1, 0.5], "held_out": [0.6], "seed": 42}
    (tmp_path / "rose.memory.json").write_text(json.dumps(column))
    distances = memorisation.read_column(tmp_path / "rose.memory.json").distances
    assert distances == Distances(12, "latents", (1, 0.5), (0.6,), seed=42)


# --- what is no record ------------------------------------------------------------------------------------------------


def edited(*keys: Any, value: Any) -> dict[str, Any]:
    """The whole history with another value at that place; None takes it away."""
    told = held = json.loads(json.dumps(records.told(WHOLE)))
    for key in keys[:-1]:
        held = held[key]
    if value is None:
        del held[keys[-1]]
    else:
        held[keys[-1]] = value
    return told


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([], "no JSON object"),
        (edited("state", value=None), "state is not there"),
        (edited("state", value="done"), "state is none of running, finished, failed"),
        (edited("rounds", 0, "seconds", value=None), "rounds.0.seconds is not there"),
        (edited("rounds", 0, "seconds", value="long"), "rounds.0.seconds is of another type"),
        (edited("rounds", 0, "sites", value=[1]), "rounds.0.sites is of another type"),
        (edited("rounds", 0, "sites", "rose", value=3), "rounds.0.sites.rose is of another type"),
        (edited("rounds", 0, "refused", value=[{"site": "lily"}]), "rounds.0.refused.0.reason is not there"),
        (edited("rounds", value={}), "rounds is of another type"),
        (edited("rounds", 0, "round", value=True), "rounds.0.round is of another type"),
        (edited("validation", 0, "sites", "rose", value={}), "validation.0.sites.rose is of another type"),
        (edited("base", value="mini"), "base is of another type"),
        (edited("version", value="1"), "its version is no number"),
        (edited("version", value=-1), "its version is no number"),
    ],
)
def test_a_history_of_another_shape_is_refused_by_the_fields_name(tmp_path, told, found):
    (tmp_path / "history.json").write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(BouquetError, match="REPORT-02") as refused:
        read(tmp_path)
    assert found in refused.value.found


def test_a_file_too_large_to_be_a_record_is_not_read_into_memory(tmp_path):
    with (tmp_path / "history.json").open("wb") as file:
        file.truncate(2**40)  # a terabyte of nothing, which takes no room
    with pytest.raises(BouquetError, match="REPORT-02") as refused:
        history.read(tmp_path / "history.json")
    assert "larger than" in refused.value.found


@pytest.mark.parametrize("name", ["history.json", "worth.json", "memory.json"])
def test_what_a_newer_version_wrote_is_refused_and_says_so(tmp_path, name):
    written(tmp_path, a_history())
    (tmp_path / "worth.json").write_text(json.dumps({"seeds": [1], "sites": {"rose": compared([0.2], [0.1])}}))
    memorisation.write(tmp_path / "memory.json", Memory({"rose": NEAR}))
    known = json.loads((tmp_path / name).read_text())
    newest = 2 if name == comparison.FILE else 1
    told = known | {"version": 3}
    (tmp_path / name).write_text(json.dumps(told))
    with pytest.raises(BouquetError, match="REPORT-05") as refused:
        read(tmp_path)
    assert f"of version 3, and this program reads up to {newest}" in refused.value.found


def test_names_that_a_record_does_not_know_are_passed_over(tmp_path):
    told = a_history()
    told["mood"] = told["rounds"][0]["mood"] = told["rounds"][0]["sites"]["rose"]["mood"] = "good"
    assert page(read(written(tmp_path / "with", told))) and "mood" not in json.dumps(
        records.told(read(tmp_path / "with").history)
    )


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAGE_RECORDS, ids=lambda kind: kind.__name__)
def test_the_page_has_every_field(kind):
    text = (ROOT / "docs/records.md").read_text()
    name = kind.__name__
    assert re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)[1] == table(kind)


def test_the_page_is_in_the_index_and_names_the_files():
    text = Path(ROOT / "docs/records.md").read_text()
    assert "(records.md)" in (ROOT / "docs/README.md").read_text()
    files = (history.FILE, history.STATUS, f"final/{history.PROVENANCE}", comparison.FILE, memorisation.FILE)
    assert all(f"`<run>/{file}`" in text for file in files)
