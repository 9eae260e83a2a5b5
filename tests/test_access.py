"""scripts/access: every attack tells a hub that lets it through from one that does not; and the real hub against
Flower's quickstart.

Offline: tests/kit/false_hub.py. With Docker: the real thing, but for the attacks by load (a minute more:
`scripts/access --only load`).
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import sh

from app.errors import BouquetError
from benchmarks.access import __main__ as access
from benchmarks.access import attacks as framework
from benchmarks.access import load
from benchmarks.access.attacks import ATTACKS, REFUSED, REMAINS, THROUGH, UNTRIED, Attack, Hub, Result, try_all
from benchmarks.access.door import only_the_door
from benchmarks.access.load import sites_afterwards
from benchmarks.access.run import WITNESS, an_app, ran
from benchmarks.hostile import CONTROL, Answer, Door, parse
from bouquet import ROOT
from tests.kit.false_hub import FalseHub

QUICK = "--only join run trust path TLS network"
REMAINING = {"replayed signed header within its window: one header 2 s old, ten connections, ten different calls"}
STOCK = {  # what gets through Flower's quickstart: the rest it refuses as well
    "a key that nobody admitted: a SuperNode's register-node, then activate-node",
    "self-registration from outside, as `flwr supernode register`: POST /v1/control/register-node",
    "start-run from outside, with nothing but the CA file",
    "acquire-task without the secret, from outside",
    "acquire-task without the secret, at the SuperLink itself (ours: from the hub host's loopback)",
    "an unsigned bundle, run by whoever has the hub",
    "a signed bundle with a word altered, passed off with the signature of the true one",
    "a bundle that a stranger signed, also under the publisher's name",
    "every Control and Runtime call, and a SuperNode's register-node and unregister-node, by name",
    "/docs, /openapi.json, /redoc, /health, /",
    "from a container on a network that is none of the hub's: every address and every kind of path",
    "from a site's own container: every address and every kind of path",
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning"),  # TLS 1.0 is an attack here
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # flwr 1.41 with pathspec 1.1
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacks by load, at a size that a hub of Python can be asked for."""
    for name, value in {"GIGABYTE": 2**24, "BODY": 1000, "ADDRESSES": 2, "SLOW": 40, "PATIENCE": 4}.items():
        monkeypatch.setattr(load, name, value)


@pytest.fixture(params=[True, False], ids=["open", "closed"])
def false_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FalseHub]:
    hub = FalseHub(tmp_path, request.param)
    yield hub
    hub.close()


# --- each attack
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.run.__name__)
def test_an_attack_gets_through_a_hub_that_is_open_and_not_through_one_that_is_closed(
    attack: Attack, false_hub: FalseHub, small: None
) -> None:
    hub = false_hub.under_attack()
    if false_hub.open and attack.run is sites_afterwards:
        assert hub.own == {1, 2}
        false_hub.offline.add(1)
    result = attack.run(hub)
    wanted = REMAINS if attack.name in REMAINING else THROUGH if false_hub.open else REFUSED
    assert result.verdict == wanted, result.got


def test_a_run_that_appears_at_the_hub_got_through_whatever_the_door_answered(tmp_path: Path) -> None:
    shut = FalseHub(tmp_path, lets_through=False)
    hub = shut.under_attack()

    def behind_its_back(hub: Hub) -> Result:
        shut.runs.add(8)
        return Result.of(False, hub.door.send("POST", CONTROL + "start-run"))

    results = attacks(hub, Attack("run", "says 404 and does it", (), behind_its_back))
    assert results == {"says 404 and does it": Result(THROUGH, "404; 1 new runs at the hub")}
    shut.close()


def test_a_site_that_appears_got_through_and_a_run_of_the_operators_own_did_not(tmp_path: Path) -> None:
    shut = FalseHub(tmp_path, lets_through=False)
    hub = shut.under_attack()

    def operators_run(hub: Hub) -> Result:
        shut.runs.add(8)
        hub.started.add(8)
        return Result.of(False, "")

    def new_site(hub: Hub) -> Result:
        shut.nodes[9] = b"key"
        return Result.of(False, "")

    assert attacks(hub, Attack("trust", "own", (), operators_run)) == {"own": Result(REFUSED, "")}
    assert attacks(hub, Attack("join", "site", (), new_site)) == {"site": Result(THROUGH, "; 1 new sites at the hub")}
    shut.close()


def attacks(hub: Hub, *some: Attack) -> dict[str, Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framework, "ATTACKS", list(some))
        return try_all(hub, set(), lambda line: None)


def test_an_attack_that_needs_what_is_not_known_says_so(tmp_path: Path) -> None:
    shut = FalseHub(tmp_path, lets_through=False)
    stranger = Hub(Door("127.0.0.1", shut.port, shut.ca.file))
    found = attacks(stranger, Attack("trust", "inner", ("operator", "inside"), ran))
    assert found == {"inner": Result(UNTRIED, "needs operator, inside")}
    shut.close()


def test_a_door_that_answers_nobody_proves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(BouquetError, match="HOST-12"):
        port = silent.getsockname()[1]
        silent.close()
        attacks(Hub(Door("127.0.0.1", port, tmp_path / "no.crt")), *ATTACKS)


def test_no_bundle_counts_as_refused_where_the_signed_one_does_not_run_either(tmp_path: Path) -> None:
    shut = FalseHub(tmp_path, lets_through=False)
    hub = shut.under_attack()
    hub.inside = lambda service, command: ""
    with pytest.raises(AssertionError, match="must run at both"):
        next(each for each in ATTACKS if each.group == "trust").run(hub)
    shut.close()


def test_the_witness_is_an_app_that_flower_takes() -> None:
    compile(WITNESS.replace("NAME", "x").replace("SITES", "[1]"), "one.py", "exec")
    assert an_app(WITNESS.encode(), "client") != an_app(WITNESS.replace("NAME", "x").encode(), "client")


# --- reading what came back
# ------------------------------------------------------------------------------------------------


def test_a_stream_of_answers_is_read_one_by_one_without_interim_ones() -> None:
    stream = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 x\r\nContent-Type: application/json\r\nContent-Length:"
        b" 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\nrest"
    )
    assert parse(stream) == [Answer(401, "application/json", b"{}"), Answer(200, "", b"rest")]
    assert parse(b"") == parse(b"SSH-2.0") == []


@pytest.mark.parametrize(
    "kind, superlink", [("application/json", True), ("application/protobuf", True), ("text/html", False), ("", False)]
)
def test_the_superlinks_own_answers_are_told_from_a_proxys(kind: str, superlink: bool) -> None:
    assert Answer(404, kind, b"").from_superlink is superlink


DOOR = {
    "POST /v1/fleet/pull-messages": [401, True],
    "POST /v1/control/list-runs": [404, False],
    "GET /docs": [404, False],
}


@pytest.mark.parametrize("seen, verdict", [
    ({"door": DOOR, "superlink": "TimeoutError"}, REFUSED),
    ({"door": DOOR, "superlink": {"GET /docs": ["SSLError", False]}}, THROUGH),
    ({"door": DOOR | {"POST /v1/control/list-runs": [400, True]}, "superlink": "TimeoutError"}, THROUGH),
])  # fmt: skip
def test_nothing_but_the_sites_calls_may_answer_and_no_other_address_may_connect(seen: dict, verdict: str) -> None:
    assert only_the_door(seen, "door").verdict == verdict


def test_a_network_from_which_the_door_itself_cannot_be_reached_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="must answer"):
        only_the_door({"door": "TimeoutError", "superlink": "TimeoutError"}, "door")


def test_the_table_shows_what_got_through_in_bold_and_what_was_not_tried_as_a_dash() -> None:
    rows = [
        {
            "group": "run",
            "attack": "a",
            "stock": {"verdict": THROUGH, "got": "200 | x"},
            "ours": {"verdict": REFUSED, "got": "404"},
        }
    ]
    rows.append({"group": "run", "attack": "b", "stock": None, "ours": {"verdict": REMAINS, "got": "c"}})
    assert access.markdown(rows).splitlines()[2:] == [
        "| run | a | **got through**: 200 \\| x | refused: 404 |",
        "| run | b | - | remains: c |",
    ]


# --- the command, and docs/security.md
# ----------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The commands of docs/security.md, without their remarks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/security.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].rstrip() for block in blocks for line in block.splitlines() if line]


BOTH, ONE = "scripts/access", "scripts/access --ours hub.example.org:8443 --ca ca.crt"


def test_the_pages_commands_are_those_that_are_executed_here() -> None:
    assert documented() == [BOTH, ONE]


@pytest.mark.slow
def test_the_command_against_a_hub_that_runs_ends_with_1_where_something_got_through(
    false_hub: FalseHub, tmp_path: Path
) -> None:
    command = ONE.replace("hub.example.org:8443", f"127.0.0.1:{false_hub.port}").replace(
        "ca.crt", str(false_hub.ca.file)
    )
    done = sh(f"{command} --only join path --json {tmp_path}/found.json", ROOT, check=False)
    assert done.returncode == int(false_hub.open), done.stdout
    found = {row["attack"]: row["ours"]["verdict"] for row in json.loads((tmp_path / "found.json").read_text())}
    tried = {THROUGH} if false_hub.open else {REFUSED}
    # those of an insider, with --key
    assert set(found.values()) == tried | {UNTRIED} and list(found.values()).count(UNTRIED) == 4
    assert "| join | no key: each of the 10 calls of a SuperNode without a signature |" in done.stdout


def test_the_command_against_a_hub_that_is_not_there_ends_with_2(tmp_path: Path) -> None:
    done = sh(f"{ONE.replace('hub.example.org:8443', '127.0.0.1:1')} --json {tmp_path}/found.json", ROOT, check=False)
    assert (
        done.returncode == 2
        and "HOST-12  The hub to attack does not answer." in done.stdout
        and not (tmp_path / "found.json").exists()
    )


def table() -> dict[str, list[str]]:
    """The table of docs/security.md: attack -> the verdicts in its two columns."""
    rows = re.findall(
        r"^\| (?:join|run|trust|path|TLS|network|load) \| (.*?) \| (.*?) \| (.*?) \|$",
        (ROOT / "docs/security.md").read_text(),
        re.MULTILINE,
    )
    return {attack: [cell.replace("*", "").partition(":")[0] for cell in cells] for attack, *cells in rows}


def test_the_pages_table_has_every_attack_and_nothing_got_through_ours() -> None:
    shown = table()
    assert list(shown) == [each.name for each in ATTACKS]
    assert {name for name, (_, ours) in shown.items() if ours != REFUSED} == REMAINING
    assert {name for name, (stock, _) in shown.items() if stock == THROUGH} >= STOCK


@pytest.mark.slow
@pytest.mark.usefixtures("docker")
def test_nothing_gets_through_the_hub_and_as_much_as_the_page_says_through_flowers_quickstart(tmp_path: Path) -> None:
    done = sh(
        f"{BOTH} {QUICK} --json {tmp_path}/found.json",
        ROOT,
        check=False,
        COMPOSE_PROJECT_NAME=f"not-mine-{os.getpid()}",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    rows = {row["attack"]: row for row in json.loads((tmp_path / "found.json").read_text())}
    assert set(rows) == {each.name for each in ATTACKS if each.group in QUICK.split()}
    for column, at in (("stock", 0), ("ours", 1)):
        assert {name: row[column]["verdict"] for name, row in rows.items()} == {
            name: table()[name][at] for name in rows
        }
