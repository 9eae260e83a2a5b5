"""Sites run only what a publisher they pin has signed: a real hub, two real sites over TLS, the real app."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import sh
from flwr.cli.build import build_fab_from_disk
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.superlink import main as superlink_main
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.supernode.start_client_internal import _verify_fab
from sqlalchemy.exc import OperationalError
from starlette.requests import Request
from starlette.responses import Response

from app import bundle
from app.errors import BouquetError
from bouquet import ROOT
from bouquet.flower import superlink
from bouquet.flower.superlink import signatures
from bouquet.flower.trust import DAY, DAYS
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.following import follow
from bouquet.hub.runs import CONNECTION, connect, flwr
from bouquet.hub.sign import publisher_id, publisher_key, sign, trust
from tests.kit.wait import PATIENT

TINY = "rounds=1 round-retries=0 local-steps=2 batch-size=2 lora-rank=2 validation-timesteps=1 sample-prompts=''"
REFUSED = "TRUST-01  The site does not trust this code"
FLOWERS_LINE = "FAB verification failed"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The app's part of this checkout, to be altered."""
    folder = tmp_path / "bouquet"
    shutil.copytree(ROOT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def alter(app: Path, old: str, new: str) -> None:
    """Change the code that runs at a site, in one place."""
    file = app / "app" / "site" / "client_app.py"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


# --- signing
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr 1.41 with pathspec 1.1
def test_the_checkout_and_what_flwr_run_sends_are_the_same_bytes_everywhere(checkout: Path) -> None:
    (checkout / "app" / "notes.txt").write_text("not in the bundle\n")
    assert bundle.build(checkout) == build_fab_from_disk(checkout) == bundle.build(ROOT)


def test_a_new_publisher_gets_a_key_that_nobody_else_may_read_and_what_the_sites_pin(tmp_path: Path) -> None:
    key = publisher_key(tmp_path / "publisher.key")
    assert (tmp_path / "publisher.key").stat().st_mode & 0o777 == 0o600
    pinned = yaml.safe_load((tmp_path / "trusted.yaml").read_text())
    assert pinned == {
        publisher_id(key.public_key()): (tmp_path / "publisher.pub").read_text().removesuffix(" publisher\n")
    }
    assert list(pinned.values())[0].startswith("ssh-ed25519 ")
    assert publisher_key(tmp_path / "publisher.key").public_key() == key.public_key()


def test_a_publisher_whose_private_key_is_elsewhere_is_not_replaced(tmp_path: Path) -> None:
    publisher_key(tmp_path / "publisher.key")
    (tmp_path / "publisher.key").unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(BouquetError, match="TRUST-02"):
        publisher_key(tmp_path / "publisher.key")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_flowers_own_check_takes_the_signature_over_these_bytes_and_no_others(tmp_path: Path) -> None:
    key, other = (publisher_key(tmp_path / name / "publisher.key") for name in ("ours", "other"))
    content = b"a bundle"
    digest = sign(content, key, tmp_path).stem
    assert digest == hashlib.sha256(content).hexdigest()
    carried, pins = (
        signatures(digest, tmp_path),
        lambda *keys: yaml.safe_load(trust(*(key.public_key() for key in keys))),
    )
    assert _verify_fab(Fab(digest, content, carried), pins(key))
    assert _verify_fab(Fab(digest, content, carried), pins(other, key))
    assert not _verify_fab(Fab(digest, content, carried), pins(other))
    assert not _verify_fab(Fab(digest, b"A bundle", carried), pins(key))


def test_a_bundle_may_have_several_publishers_and_signing_again_changes_nothing(tmp_path: Path) -> None:
    keys = [publisher_key(tmp_path / name / "publisher.key") for name in ("one", "two")]
    for key in keys:
        file = sign(b"a bundle", key, tmp_path / "signatures")
    before = file.stat().st_mtime_ns, file.read_text()
    assert set(json.loads(before[1])) == {publisher_id(key.public_key()) for key in keys}
    assert sign(b"a bundle", keys[0], tmp_path / "signatures") == file
    assert (file.stat().st_mtime_ns, file.read_text()) == before


def test_a_signature_that_no_longer_holds_is_made_again(tmp_path: Path) -> None:
    key = publisher_key(tmp_path / "publisher.key")
    file = sign(b"a bundle", key, tmp_path)
    good = json.loads(file.read_text())
    spoiled = {publisher: record | {"signed_at": record["signed_at"] - 1} for publisher, record in good.items()}
    file.write_text(json.dumps(spoiled))
    sign(b"a bundle", key, tmp_path)
    assert _verify_fab(
        Fab(file.stem, b"a bundle", signatures(file.stem, tmp_path)), yaml.safe_load(trust(key.public_key()))
    )


@pytest.mark.parametrize("content", [None, "{", ""])
def test_a_bundle_without_a_readable_signature_file_goes_out_unsigned_and_the_hub_says_so(
    content: str | None, tmp_path: Path, capfd
) -> None:
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    if content is not None:
        (tmp_path / f"{digest}.json").write_text(content)
    assert signatures(digest, tmp_path) == {"valid_license": "Valid"}
    assert f"bundle {digest[:12]} has no signature here" in capfd.readouterr().out


def test_a_reply_in_another_sites_name_never_reaches_the_hubs_state(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda request, state: taken.append(request))
    superlink.refuse_impostors()

    def reply(sender: int, written: int) -> PushMessagesRequest:
        return PushMessagesRequest(
            node=Node(node_id=sender), messages_list=[Message(metadata=Metadata(src_node_id=written))]
        )

    with pytest.raises(FlowerError) as refused:
        fleet_handlers.push_messages(reply(1, 2), None)
    assert refused.value.code == ApiErrorCode.FORBIDDEN_ACTION and taken == []
    fleet_handlers.push_messages(reply(2, 2), None)
    assert taken == [reply(2, 2)]


def test_a_reply_of_endless_pieces_never_reaches_the_hubs_state(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda request, state: taken.append(request))
    superlink.refuse_impostors()

    def reply(pieces: int) -> PushMessagesRequest:
        tree = ObjectTree(object_id="m", children=[ObjectTree(object_id=str(n)) for n in range(pieces - 1)])
        message = Message(metadata=Metadata(src_node_id=2))
        return PushMessagesRequest(node=Node(node_id=2), messages_list=[message], message_object_trees=[tree])

    fleet_handlers.push_messages(reply(1000), None)
    with pytest.raises(FlowerError):
        fleet_handlers.push_messages(reply(1001), None)
    assert taken == [reply(1000)]


def test_a_node_that_misbehaves_is_told_of_by_its_own_number_at_rare_counts(monkeypatch, capfd) -> None:
    monkeypatch.setattr(fleet_handlers, "push_messages", lambda request, state: None)
    monkeypatch.setattr(superlink, "seen", superlink.Counter())
    superlink.refuse_impostors()
    for written in range(10, 1210):
        message = Message(metadata=Metadata(src_node_id=written))
        request = PushMessagesRequest(node=Node(node_id=7), messages_list=[message])
        with pytest.raises(FlowerError):
            fleet_handlers.push_messages(request, None)
    what = "bouquet: node 7 sent a reply in another SuperNode's name; refused"
    rarely = [f"{what} ({count} times by now)" for count in (10, 100, 1000)]
    assert capfd.readouterr().out.splitlines() == [what, *rarely]
    for number in range(3 * superlink.MOST_TOLD):
        superlink.tell(f"{number}\x1b")
    assert len(superlink.seen) <= superlink.MOST_TOLD and "\x1b" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [(OperationalError("INSERT", {}, Exception("database or disk is full")), 503), (ValueError("a bug"), 500)],
)
def test_a_database_that_cannot_be_written_is_answered_with_try_again_and_a_bug_is_not(
    error, status, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(superlink_main, "http_error_translator", superlink_main.http_error_translator)
    superlink.ask_to_come_back()

    async def fails(request: Request) -> Response:
        raise error

    request = Request(
        {
            "type": "http",
            "path": "/v1/runtime/acquire-task",
            "headers": [],
            "method": "POST",
            "server": ("hub", 443),
            "query_string": b"",
        }
    )
    assert asyncio.run(superlink_main.http_error_translator(request, fails)).status_code == status
    said = "bouquet: /v1/runtime/acquire-task was answered with 503: database or disk is full\n"
    assert capfd.readouterr().out.endswith(said) == (status == 503)


@pytest.mark.slow
def test_a_supernode_whose_heartbeat_has_died_ends_so_that_it_can_be_started_again() -> None:
    code = f"""
import runpy, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import flwr.supernode.cli as cli
def alive():
    threading.Thread(target=lambda: 1 / 0).start()
    time.sleep(60)
cli.flower_supernode = alive
runpy.run_module("bouquet.flower.supernode", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert "a thread of the SuperNode has died" in done.stdout


def test_the_command_shows_the_fingerprint_that_ssh_keygen_shows(project: Path) -> None:
    shown = sh("scripts/bouquet hub sign --key .bouquet/publisher/publisher.key", project).stdout
    [digest] = [file.stem for file in (project / ".bouquet/signatures").iterdir()]
    assert digest == hashlib.sha256(bundle.build(project)).hexdigest() and f"bundle {digest[:12]}" in shown
    assert sh("ssh-keygen -lf .bouquet/publisher/publisher.pub", project).stdout.split()[1] in shown
    assert len(base64.b64decode(shown.split("SHA256:")[1].split()[0] + "=")) == 32


# --- a federation whose sites pin a publisher
# ------------------------------------------------------------------------------


@dataclass
class Outcome:
    state: str
    details: str
    lines: list[str]
    history: dict


class Trusting(Processes):
    """Two sites that pin the publisher of certs/; site-2: at most 2 local steps, signatures of up to 400 days."""

    def start(self) -> None:
        self.start_hub()
        self.register()
        self.start_site("site-1")
        self.env |= {"SITE_LIMITS": "max-local-steps=2 base-models=mini", "SITE_TRUST_DAYS": "400"}
        self.start_site("site-2")
        self.wait_until_online(2)

    def run(self, app: Path, config: str = TINY) -> Outcome:
        """`flwr run APP remote-deployment` to its end."""
        run, lines = flwr("run", str(app), CONNECTION, "--run-config", config)["run-id"], []
        state, details = follow(run, lines.append)
        return Outcome(state, details, lines, json.loads((self.fetch(run) / "history.json").read_text()))

    def memory(self, site: str) -> Path:
        """Where the site keeps what ran there."""
        return self.home / "cache" / site / "publishers.json"

    def said(self, words: str) -> dict[str, int]:
        """How often each site's log has these words."""
        return {site: (self.logs / f"{site}.log").read_text().count(words) for site in self.sites}


@pytest.fixture(scope="module")
def federation(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trusting]:
    home = tmp_path_factory.mktemp("home")
    sh(
        "scripts/certs && scripts/bouquet data partition --dataset mini --sites 2 --images-per-site 24"
        " && scripts/bouquet hub sign",
        project,
    )
    sites = {name: project / ".bouquet/data" / name for name in ("site-1", "site-2")}
    running = Trusting(home, project / "certs", free_port(), sites, trusted=project / "certs/trusted.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_HOME", str(home / "operator"))
        connect(running.address, project / "certs/ca.crt")
        try:
            running.start()
            yield running
        finally:
            running.stop()


@pytest.fixture
def signed(federation: Trusting) -> Iterator[Path]:
    """The signature file of this checkout's bundle, for the length of one test."""
    file = sign(bundle.build(ROOT), publisher_key(federation.certs / "publisher.key"), federation.signatures)
    yield file
    file.unlink()


def assert_refused_by_both(federation: Trusting, app: Path) -> None:
    before, worked, told = federation.said(FLOWERS_LINE), federation.said("bouquet: "), federation.said("\nTRUST-01  ")
    outcome = federation.run(app)
    assert outcome.state == "finished:failed"
    for site in ("site-1", "site-2"):
        assert f"{site}: {REFUSED}" in outcome.details
        assert any(line.startswith(f"bouquet: refused  {site}: {REFUSED}") for line in outcome.lines)
        assert f"{site}: {REFUSED}" in outcome.history["error"]
    assert outcome.history["rounds"] == []
    assert federation.said(FLOWERS_LINE) == {site: count + 1 for site, count in before.items()}
    assert federation.said("\nTRUST-01  ") == {site: count + 1 for site, count in told.items()}
    assert federation.said("bouquet: ") == worked


def test_an_unsigned_checkout_is_refused_by_both_sites_and_the_hub_says_why(federation: Trusting) -> None:
    assert_refused_by_both(federation, ROOT)
    assert "has no signature here" in (federation.logs / "superlink.log").read_text()


def test_one_altered_byte_is_refused_by_both_sites_also_when_the_hub_passes_it_off_as_signed(
    federation: Trusting, signed: Path, checkout: Path
) -> None:
    alter(checkout, "The ClientApp", "the ClientApp")
    forged = signed.with_name(f"{hashlib.sha256(bundle.build(checkout)).hexdigest()}.json")
    assert forged != signed
    shutil.copy(signed, forged)
    assert_refused_by_both(federation, checkout)


def test_a_strangers_signature_is_refused_by_both_sites_also_under_the_pinned_publishers_name(
    federation: Trusting, checkout: Path, tmp_path: Path
) -> None:
    alter(checkout, "\nimport os\n", "\nimport os\nprint('a stranger was here', flush=True)\n")
    file = sign(bundle.build(checkout), publisher_key(tmp_path / "publisher.key"), federation.signatures)
    [(stranger, record)] = json.loads(file.read_text()).items()
    [pinned] = yaml.safe_load(federation.trusted.read_text())
    file.write_text(json.dumps({stranger: record, pinned: record}))
    assert_refused_by_both(federation, checkout)
    assert federation.said("a stranger was here") == {"site-1": 0, "site-2": 0}


def test_a_signed_run_that_asks_for_more_than_a_site_allows_is_refused_by_that_site(
    federation: Trusting, signed: Path
) -> None:
    outcome = federation.run(ROOT, TINY.replace("local-steps=2", "local-steps=3"))
    assert outcome.state == "finished:failed"
    assert "HUB-02" in outcome.details and "1 of 2" in outcome.details
    assert (
        "site-2: HUB-04  The site could not take part: TRUST-03 The run's 'local-steps' is not within what this site"
        " allows." in outcome.details
    )
    assert (
        "max-local-steps=2" in (federation.logs / "site-2.log").read_text() and "max-local-steps" not in outcome.details
    )


def test_a_runs_config_cannot_lift_a_sites_limit(federation: Trusting, signed: Path) -> None:
    for key in ("limits=''", "max-local-steps=9", "node-config=''"):
        with pytest.raises(BouquetError, match="HOST-08"):
            flwr("run", str(ROOT), CONNECTION, "--run-config", f"{TINY} {key}")


# --- the age of a signature
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(federation: Trusting) -> Iterator[Trusting]:
    """Sites that remember nothing that ran before, and afterwards a hub without a signature."""
    for site in federation.sites:
        federation.memory(site).unlink(missing_ok=True)
    yield federation
    for file in federation.signatures.iterdir():
        file.unlink()


def sign_at(federation: Trusting, app: Path, when: int) -> str:
    """Sign a checkout's bundle with that time in place of any other; the bundle."""
    key = publisher_key(federation.certs / "publisher.key")
    return sign(bundle.build(app), key, federation.signatures, again=True, now=when).stem


def assert_ran_at(federation: Trusting, app: Path, sites: set[str], refused: dict[str, str]) -> None:
    """A run of the app, by plain `flwr run`: these sites work on it, and are in its round where all do; the others say
    why not, by that code, and the hub hears of it.
    """
    worked, told = federation.said("bouquet: "), {code: federation.said(f"\n{code}  ") for code in refused.values()}
    outcome = federation.run(app)
    assert (outcome.state == "finished:completed") == (not refused), outcome
    assert {site for site, count in federation.said("bouquet: ").items() if count > worked[site]} == sites, outcome
    assert [set(entry["sites"]) for entry in outcome.history["rounds"]] == ([] if refused else [sites])
    for site, code in refused.items():
        assert f"{site}: {REFUSED}" in outcome.details
        assert federation.said(f"\n{code}  ")[site] == told[code][site] + 1


def test_a_signature_counts_for_as_many_days_as_the_site_says(fresh: Trusting) -> None:
    """site-1 says nothing, which is 180 days; site-2 400."""
    when = int(time.time()) - 200 * DAY
    digest = sign_at(fresh, ROOT, when)
    assert_ran_at(fresh, ROOT, {"site-2"}, refused={"site-1": "TRUST-06"})
    log = (fresh.logs / "site-1.log").read_text()
    assert "trust: bundles signed within 180 days by fpk_" in log and "200.0 days ago; SITE_TRUST_DAYS is 180" in log
    [publisher] = yaml.safe_load(fresh.trusted.read_text())
    assert json.loads(fresh.memory("site-2").read_text()) == {publisher: {"bundle": digest, "signed_at": when}}
    assert fresh.memory("site-2").stat().st_mode & 0o777 == 0o600
    assert not fresh.memory("site-1").exists()


def test_a_signature_of_the_day_after_tomorrow_is_refused_and_the_clocks_are_named(fresh: Trusting) -> None:
    sign_at(fresh, ROOT, int(time.time()) + 2 * DAY)
    assert_ran_at(fresh, ROOT, set(), refused={"site-1": "TRUST-08", "site-2": "TRUST-08"})
    assert min(fresh.said("days ahead of this host's clock").values()) == 1
    assert not fresh.memory("site-1").exists()


def test_by_plain_flwr_run_both_sites_run_a_signed_checkout_and_an_older_one_only_signed_again(
    fresh: Trusting, checkout: Path
) -> None:
    alter(checkout, "The ClientApp", "the ClientApp")
    now = int(time.time())
    sign_at(fresh, ROOT, now - 2000)
    newer = sign_at(fresh, checkout, now - 1000)
    assert_ran_at(fresh, checkout, {"site-1", "site-2"}, refused={})

    fresh.memory("site-2").unlink()  # lost: the signature's age alone counts there
    assert_ran_at(fresh, ROOT, {"site-2"}, refused={"site-1": "TRUST-07"})
    assert f"1000 s before bundle {newer[:12]}, which has run here" in (fresh.logs / "site-1.log").read_text()

    said = sh(f"scripts/bouquet hub sign --again --to {fresh.signatures}", fresh.certs.parent).stdout
    assert f"sites take it for {DAYS} more days" in said and "signed later" not in said
    assert_ran_at(fresh, ROOT, {"site-1", "site-2"}, refused={})  # at site-2 the same bundle, signed anew


def test_a_site_that_pins_nobody_does_not_start(tmp_path: Path) -> None:
    """Flower takes an empty list of publishers for none asked for, and runs any code."""
    (tmp_path / "trusted.yaml").write_text("{}\n")
    command = [
        sys.executable,
        "-m",
        "bouquet.flower.supernode",
        "--insecure",
        f"--trusted-entities={tmp_path}/trusted.yaml",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 1 and "TRUST-05  The site pins no publisher." in done.stdout + done.stderr
