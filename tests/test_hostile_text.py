"""A site's text at every place where it may surface: after it went through the real hub, and as an older version wrote
it.

What a terminal obeys, what looks like a line of ours, what turns the direction of writing, and what a page would run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app import model, records, text, wire
from app.errors import BouquetError
from app.hub import bounds, exchange, server_app
from app.hub.history import read_provenance
from benchmarks.speed.hub import StubGrid, adapter_of_size
from bouquet.adapter import card
from bouquet.hub import adapters, admission, control, roster
from bouquet.hub import status as status_
from bouquet.report import findings, progress
from bouquet.report.page import page
from bouquet.report.reading import read
from tests.kit import tiny
from tests.kit.memory import Federation
from tests.kit.runs import history

FORGED = "bouquet: round 6/6  train 0.0000"
NASTY = {  # by what it does
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;QUJD\x07",
    "cleared screen": "\x1b[2J",
    "8-bit control": "\x9b2J",
    "a line of ours": f"\n{FORGED}\r",
    "reversed": "\u202egnp.exe",
    "isolated": "\u2066x\u2069",
    "line separators": "\u2028x\u2029",
    "no width": "\u200b\u2060\ufeff",
    "tags": "\U000e0041",
    "half a character": "\ud800",
    "not given out": "\U000e0fff",
    "private use": "\ue000",
}
FIELD = "".join(NASTY.values()) + "<script>alert(1)</script>"
NAME = "=1+1" + "".join(NASTY.values())[:60]  # a name is cut at 80 characters
WIDE = {"\n", "\u00a0", "\u202f"}  # what our own pages are laid out with


def wrong(shown: str) -> list[str]:
    """What of a text a terminal or a reader would take for something else."""
    bad = [c for c in shown if c not in WIDE and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")]
    return [f"U+{ord(c):04X}" for c in bad] + [line for line in shown.splitlines() if line.startswith(FORGED)]


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield key
            yield from texts(held)
    elif isinstance(value, list):
        for held in value:
            yield from texts(held)
    elif isinstance(value, str):
        yield value


# --- app/text.py ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", NASTY)
def test_nothing_that_a_terminal_or_a_reader_obeys_is_left_in_a_line(what):
    for shown in (text.line(f"a{NASTY[what]}b"), text.printable(f"a{NASTY[what]}b")):
        assert wrong(shown) == [] and len(shown.splitlines()) == 1 and shown.startswith("a") and shown.endswith("b")
        assert text.MARK in shown or what in ("a line of ours", "line separators")  # one sees that something was there


def test_plain_text_stays_as_it_is_and_a_line_is_cut_before_it_is_worked_on():
    assert text.printable("Gärtnerei 北京  №1 é") == "Gärtnerei 北京  №1 é"
    assert text.line("  a\t b\u00a0c \n") == "a b c" and text.line("x" * 10**7) == "x" * 300 and text.line(7) == "7"


def test_a_json_value_keeps_what_can_be_shown_and_nothing_else():
    told = {"a\x1b": ["b\nc", 1e308, float("nan"), float("-inf"), 10**400, 2**63, True, None, 0.5]}
    assert text.tidy(told) == {"a\ufffd": ["b c", 1e12, 1e12, -1e12, 10**12, 2**63, True, None, 0.5]}
    assert text.tidy(["x" * 20_000], most=5) == ["xxxxx"]


def test_an_error_report_has_four_messages_whatever_was_found():
    report = BouquetError(
        "HUB-04", reason=f"H{FIELD}", found=f"one\n{FIELD}", fix=f"fix {NASTY['cleared screen']}"
    ).report()
    assert wrong(report) == [] and [line[:9] for line in report.splitlines() if not line.startswith(" " * 9)] == [
        report[:9], "  found  ", "  fix    ", "  help   ",
    ]  # fmt: skip
    assert "\n         " + "�" in report and report.splitlines()[1] == "  found  one"


def test_flowers_own_log_holds_no_text_that_a_terminal_obeys():
    logger, out = logging.getLogger("test-hostile"), io.StringIO()
    handler = logging.StreamHandler(out)
    logger.addHandler(handler)
    text.tidy_log("test-hostile", "test-hostile")
    assert len(logger.filters) == 1
    try:
        raise ValueError(FIELD)
    except ValueError as error:
        logger.error("Requesting FAB for fab_hash=%s", FIELD, exc_info=error)
    assert wrong(out.getvalue()) == [] and "ValueError" in out.getvalue()
    assert any(type(one).__name__ == "_Tidy" for one in logging.getLogger("flwr").filters)  # by app/hub/server_app.py


# --- a run ----------------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """A run's folder, and what its ServerApp printed."""

    folder: Path
    output: str


def tamper(site: str, number: str, reply: Message) -> Message:
    """site-1 takes part under a hostile name, with such a GPU and unknown metrics; site-2's reason is hostile."""
    if site == "site-2":
        reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(code=100, reason=FIELD.replace("\ud800", ""))
        return reply
    info = reply.content["info"]
    reply.content["info"] = ConfigRecord({"site": NAME, "applied": info["applied"], "gpu": FIELD, FIELD: FIELD})
    reply.content["metrics"][f"photos-{FIELD}"] = 3
    reply.content["metrics"]["../../../etc"] = 1e308
    return reply


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Told:
    """A whole run of the hub that is under test."""
    settings = {"rounds": 1, "local_steps": 1, "min_sites": 1, "sample_prompts": "", "tracker": "tensorboard"}
    federation = Federation(tmp_path_factory.mktemp("fresh"), **settings)
    nodes = federation.grid.get_nodes
    federation.grid.get_nodes = lambda: [SimpleNamespace(node_id=node.node_id, name="") for node in nodes()]
    federation.grid.tamper = tamper
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        folder = federation.go(patch)
    return Told(folder, out.getvalue())


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Told:
    """A run's folder as an older version left it, with every text as it came."""
    folder = tmp_path_factory.mktemp("old") / "7"
    folder.mkdir()
    told = history(2, 3, "running", losses={FIELD: [0.3, 0.2, 0.16, 0.15], "lily": [0.4, 0.3, 0.26, 0.25]})
    for entry in told["rounds"]:
        entry["refused"] = [{"site": FIELD, "reason": f"HUB-04  {FIELD}"}]
        entry["sites"][FIELD] |= {"gpu": FIELD, f"photos-{FIELD}": 2, "gpu-joules": 1.0, "weight": 1e308}
        entry["sites"][FIELD]["update-norm"] = 1e308
    told["validation"][-1]["weighted"] = float("inf")
    told |= {"error": FIELD, "no_final_evaluation": FIELD}
    told["refused_final_evaluation"] = [{"site": FIELD, "reason": FIELD}]
    status = {"state": "waiting", "round": 3, "attempt": 0, "since": 0.0, "deadline": 1.0}
    status |= {"replied": [FIELD], "missing": [FIELD]}
    (folder / "history.json").write_text(json.dumps(told))
    (folder / "status.json").write_text(json.dumps(status | {"refused": [{"site": FIELD, "reason": FIELD}]}))
    compared = {"held_out": 20, "loss": {"base": [0.3], "alone": [0.2], "federated": [0.1]}}
    (folder / "worth.json").write_text(json.dumps({"seeds": [1], "steps": 3, "sites": {FIELD: compared}}))
    measured = {"photos": 40, "space": FIELD, "samples": [0.1, 0.9], "held_out": [0.5] * 60}
    (folder / "memory.json").write_text(json.dumps({"sites": {FIELD: measured}}))
    (folder / "final").mkdir()
    provenance = {"run": FIELD, "made": FIELD, "sites": {FIELD: {"images": 3}}, "versions": {"torch": FIELD}}
    (folder / "final" / "provenance.json").write_text(json.dumps(provenance))
    return Told(folder, "")


def status_facts(run: Told) -> dict:
    found = read(run.folder)
    return status_.tell(found, *status_.end_of(found), {})


def sites_table(run: Told) -> str:
    """`bouquet hub sites`, where the SuperLink knows a site by a hostile name too."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    times = {"last_deactivated_at": "", "unregistered_at": 0, "last_activated_at": "", "registered_at": ""}
    node = SimpleNamespace(public_key=pem, status="offline", name=FIELD, node_id=1, **times)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("BOUQUET_ADAPTERS", str(run.folder.parent))
        patch.setattr(roster, "registered", lambda: [roster.site_of(node)])
        for as_json in (False, True):
            admission.sites(as_json)
        return (
            out.getvalue()
            + "\n".join(texts(roster.deeds(adapters.histories())))
            + "\n".join(site.name for site in roster.registered())
        )


def tracked(run: Told) -> str:
    """Every name and text that TensorBoard would show, as its files hold them."""
    events = EventAccumulator(str(run.folder / "tracker"), size_guidance={"scalars": 0}).Reload()
    names = [name for kind in ("scalars", "tensors") for name in events.Tags()[kind]]
    told = [event.tensor_proto.string_val for name in events.Tags()["tensors"] for event in events.Tensors(name)]
    values = [value.decode() for several in told for value in several]
    return "\n".join(names + [value.replace("\n    ", " ") for value in values])


def carded(run: Told) -> str:
    provenance = read_provenance(run.folder / "final" / "provenance.json")
    return card.card("garden/flowers", tiny.config(), provenance, [], "apache-2.0", "")


SURFACES: dict[str, Callable[[Told], str]] = {
    "the run's own output": lambda run: run.output,
    "history.json as read": lambda run: "\n".join(texts(records.told(read(run.folder).history))),
    "status.json as read": lambda run: "\n".join(texts(records.told(read(run.folder).status))),
    "bouquet hub status": lambda run: status_.words(status_facts(run), 0.0),
    "bouquet hub status --json": lambda run: "\n".join(texts(json.loads(json.dumps(status_facts(run))))),
    "bouquet hub sites": sites_table,
    "the progress line": lambda run: progress.line(read(run.folder)),
    "what to look at": lambda run: "\n".join(findings.warnings(read(run.folder))),
    "the report": lambda run: page(read(run.folder)),
    "the model card": carded,
}


def in_file(name: str) -> Callable[[Told], str]:
    return lambda run: "\n".join(texts(json.loads((run.folder / name).read_text())))


WRITTEN: dict[str, Callable[[Told], str]] = {  # by the hub under test alone
    "history.json": in_file("history.json"),
    "status.json": in_file("status.json"),
    "a round's metrics.json": in_file("round-0001/metrics.json"),
    "provenance.json": in_file("final/provenance.json"),
    "the tracker": tracked,
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch) -> None:
    """What Flower says of the run, and it is a site's text too: the end of a run that failed."""
    told = SimpleNamespace(
        run_id=1, status=SimpleNamespace(status="finished", sub_status="failed", details=FIELD), finished_at="now"
    )
    monkeypatch.setattr(control, "run", lambda run: control.told(told))


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("which", ["fresh", "old"])
def test_a_sites_text_is_harmless_wherever_it_is_read(which, surface, request):
    shown = SURFACES[surface](request.getfixturevalue(which))
    assert wrong(shown) == []
    assert "<script>alert(1)" not in shown or "report" not in surface and "card" not in surface


@pytest.mark.parametrize("surface", WRITTEN)
def test_a_sites_text_is_harmless_wherever_the_hub_writes_it(fresh, surface):
    assert wrong(WRITTEN[surface](fresh)) == []


def test_the_run_took_the_hostile_site_and_named_the_other(fresh):
    """Or else nothing above would have been shown."""
    [entry] = json.loads((fresh.folder / "history.json").read_text())["rounds"]
    [(name, numbers)] = entry["sites"].items()
    assert name.startswith("=1+1�]0;owned�") and len(name) <= 80
    assert numbers["gpu"].startswith("�]0;owned") and numbers["left-out"] == 2
    assert set(numbers) <= {*server_app.metrics.RANGES, "update-norm", "weight", "gpu", "left-out"}
    assert entry["refused"][0]["reason"].startswith("HUB-04  The site could not take part: �]0;owned")
    assert "refused  " in fresh.output and "the tracker tensorboard failed" not in fresh.output
    assert fresh.output.count("left out  ") == 1


def test_a_reason_is_text_to_tensorboard_and_no_markdown(fresh):
    events = EventAccumulator(str(fresh.folder / "tracker")).Reload()
    [event] = events.Tensors("refused/text_summary")
    assert all(line.startswith("    ") for line in event.tensor_proto.string_val[0].decode().split("\n"))


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_older_one_takes_over_no_hostile_text(tmp_path, monkeypatch):
    federation = Federation(tmp_path, rounds=1, local_steps=1, sample_prompts="")
    first = federation.go(monkeypatch, run_id=6)
    told = json.loads((first / "history.json").read_text())
    told["rounds"][0]["refused"] = [{"site": FIELD, "reason": FIELD}]
    told["rounds"][0]["train_loss"] = float("inf")
    (first / "history.json").write_text(json.dumps(told))
    federation.run_config |= {"rounds": 2, "resume": "6"}
    federation.go(monkeypatch)
    written = (federation.adapters / "7" / "history.json").read_text()
    assert wrong("\n".join(texts(json.loads(written)))) == [] and "Infinity" not in written


# --- names ----------------------------------------------------------------------------------------------------------


class Named(StubGrid):
    """Two nodes whose registered names are given; every site says that it is site-1."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__(len(names), [wire.pack(adapter_of_size(0.1, 1))])
        self.names, self.images = names, 400

    def get_nodes(self) -> list:
        return [SimpleNamespace(node_id=node, name=name) for node, name in self.names.items()]

    def pull_messages(self, message_ids) -> list[Message]:
        [order] = [self.orders.pop(name) for name in message_ids]
        numbers = MetricRecord({"num-examples": self.images, "train-loss": 0.1, "validation-loss": 0.1})
        info = ConfigRecord({"site": "site-1", "applied": self.sent, "gpu": ""})
        return [Message(RecordDict({"arrays": self.replies[0], "metrics": numbers, "info": info}), reply_to=order)]


def exchanged(names: dict[int, str], folder: Path, monkeypatch, admitted: tuple[str, ...] = ()) -> tuple[list, list]:
    """(names of the sites that counted, what was refused) of a round."""
    tiny.be_the_hub(monkeypatch)
    folder.mkdir()
    config = tiny.config(min_sites=1)
    kept, refused = exchange.Exchange(Named(names), config, "", folder, admitted).round(1, adapter_of_size(0.1, 0))
    return [reply.site for reply in kept], records.told(refused)


def test_a_site_admitted_under_a_number_goes_by_that_and_takes_nobodys_name(tmp_path, monkeypatch):
    assert exchanged({2: "42", 3: "site-1"}, tmp_path / "7", monkeypatch, ("42", "site-1")) == (["42", "site-1"], [])


@pytest.mark.parametrize("admitted", [(), ("site-1",)])
def test_where_the_hub_has_names_a_node_without_one_goes_by_its_number(admitted, tmp_path, monkeypatch):
    assert exchanged({2: "", 3: "site-1"}, tmp_path / "7", monkeypatch, admitted) == (["node 2", "site-1"], [])


def test_a_node_without_a_name_is_not_believed_where_those_with_one_are_away(tmp_path, monkeypatch):
    assert exchanged({2: ""}, tmp_path / "7", monkeypatch, ("site-1",)) == (["node 2"], [])


def test_without_any_names_a_site_goes_by_its_own_and_two_of_one_are_told(tmp_path, monkeypatch):
    kept, refused = exchanged({2: "", 3: ""}, tmp_path / "7", monkeypatch)
    assert kept == ["site-1"] and refused == [{"site": "node 3", "reason": "HUB-07  Another site has the same name."}]


def test_a_hostile_name_from_the_superlink_is_harmless_on_the_way_in(tmp_path, monkeypatch, capsys):
    kept, _ = exchanged({2: FIELD, 3: FIELD}, tmp_path / "7", monkeypatch)
    status = json.loads((tmp_path / "7" / "status.json").read_text())
    assert wrong(capsys.readouterr().out) == wrong("\n".join([*kept, *texts(status)])) == [] and len(kept[0]) <= 80


# --- what one reply may make the hub hold ---------------------------------------------------------------------------


def fetch(contents: dict[str, bytes], most: int = 1000) -> dict[str, bytes]:
    """What Flower's Grid gets of a reply of these objects."""
    bounds.bound_replies(most, 2.0**40)
    return bounds.http_grid.pull_objects(object_ids=list(contents), pull_object_fn=contents.get)


def test_a_reply_is_fetched_up_to_its_bound_and_with_one_array():
    whole = {"a": b"Array c 3\0abc", "c": b"ArrayChunk  900\0" + b"x" * 900, "r": b"ArrayRecord a 0\0"}
    assert fetch(whole) == whole
    with pytest.raises(BouquetError, match="HUB-05.*too large"):
        fetch(whole, most=900)
    with pytest.raises(BouquetError, match="HUB-05.*more than one array"):
        fetch(whole | {"b": b"Array c,c 5\0abcde"})


def test_a_reply_that_fails_in_an_unforeseen_way_spoils_no_other(tmp_path, monkeypatch):
    accept = exchange.guard.accept

    def fails(message, *args, site, **kwargs):
        if site == "site-2":
            raise RecursionError(FIELD)
        return accept(message, *args, site=site, **kwargs)

    monkeypatch.setattr(exchange.guard, "accept", fails)
    kept, refused = exchanged({2: "site-1", 3: "site-2"}, tmp_path / "7", monkeypatch)
    reason = "HUB-05  The reply cannot be used: RecursionError."
    assert kept == ["site-1"] and refused == [{"site": "site-2", "reason": reason}]


def test_many_sites_make_no_endless_sentence(tmp_path, monkeypatch):
    names = {node: f"site-{node}" for node in range(100, 140)}
    monkeypatch.setattr(model, "check_adapter", lambda *_: None)
    monkeypatch.setattr(exchange.guard, "accept", lambda *_, **__: 1 / 0)
    with pytest.raises(BouquetError, match="HUB-02") as caught:
        exchanged(names, tmp_path / "7", monkeypatch)
    assert str(caught.value).count("HUB-05") == 20 and str(caught.value).endswith("; and 20 more")
