"""How old a bundle may be that a site runs: the rules, the memory, Flower's check with both, signing that keeps up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import copy_project, sh
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from app import bundle
from app.errors import BouquetError
from bouquet import ROOT
from bouquet.flower.superlink import signatures
from bouquet.flower.trust import DAY, DAYS, Ran, Refusal, days, read, refusals
from bouquet.hub.sign import publisher_id, publisher_key, sign, sign_all
from tests.kit.wait import PATIENT

NOW = 1_800_000_000
A, B = "a" * 64, "b" * 64


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "publishers.json"


def judge(memory: Path, bundle: str, now: float = NOW, limit: int = DAYS, **signed: int) -> list[str]:
    """The codes by which a site refuses a bundle that these publishers signed at these times."""
    return [reason.code for reason in refusals(bundle, signed, memory, now, limit)]


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signed_at", "codes"),
    [(NOW, []), (NOW - 180 * 86_400, []), (NOW - 180 * 86_400 - 1, ["TRUST-06"]), (0, ["TRUST-06"]),
     (NOW + 86_400, []), (NOW + 86_401, ["TRUST-08"]), (2**64 - 1, ["TRUST-08"])],
)  # fmt: skip
def test_a_signature_counts_for_180_days_and_from_a_clock_that_is_a_day_ahead(
    memory: Path, signed_at: int, codes: list[str]
) -> None:
    assert judge(memory, A, p=signed_at) == codes
    assert memory.exists() == (not codes)


def test_a_site_may_say_another_number_of_days(memory: Path) -> None:
    assert judge(memory, A, limit=7, p=NOW - 8 * DAY) == ["TRUST-06"]
    assert judge(memory, A, limit=400, p=NOW - 399 * DAY) == []


def test_no_other_bundle_that_its_publisher_signed_before_the_newest_that_ran(memory: Path) -> None:
    assert judge(memory, A, p=NOW - 100) == []
    assert judge(memory, B, p=NOW - 101) == ["TRUST-07"]
    assert read(memory) == {"p": Ran(A, NOW - 100)}
    assert judge(memory, B, p=NOW - 99) == []
    assert judge(memory, A, p=NOW - 100) == ["TRUST-07"], "B is the newest now"
    assert judge(memory, A, p=NOW) == [], "signed again"
    assert judge(memory, B, p=NOW - 99) == ["TRUST-07"]


def test_two_bundles_signed_in_the_same_second_run_by_turns(memory: Path) -> None:
    assert [judge(memory, name, p=NOW) for name in (A, B, A, B)] == [[], [], [], []]


def test_the_same_bundle_runs_with_an_older_signature_and_the_newest_stays_remembered(memory: Path) -> None:
    assert judge(memory, A, p=NOW - 100) == [] == judge(memory, A, p=NOW - 200)
    assert read(memory) == {"p": Ran(A, NOW - 100)}
    assert judge(memory, B, p=NOW - 150) == ["TRUST-07"]


def test_a_refused_bundle_is_not_remembered(memory: Path) -> None:
    assert judge(memory, A, p=NOW) == []
    before = memory.read_bytes()
    assert judge(memory, B, p=NOW + 2 * DAY) == ["TRUST-08"]
    assert judge(memory, B, q=NOW - 181 * DAY) == ["TRUST-06"]
    assert memory.read_bytes() == before


def test_one_publisher_whose_signature_passes_both_rules_is_enough(memory: Path) -> None:
    assert judge(memory, A, p=NOW - 10, q=NOW - 10) == []
    assert judge(memory, B, p=NOW - 20, q=NOW - 181 * DAY) == ["TRUST-07", "TRUST-06"]
    assert judge(memory, B, p=NOW - 20, q=NOW) == []
    assert read(memory) == {"p": Ran(A, NOW - 10), "q": Ran(B, NOW)}, "of p nothing newer ran"


def test_a_publisher_is_not_bound_by_what_another_signed(memory: Path) -> None:
    assert judge(memory, A, p=NOW) == []
    assert judge(memory, B, q=NOW - 1000) == []


def test_a_bundle_that_no_pinned_publisher_signed_is_refused_and_nothing_is_written(memory: Path) -> None:
    assert judge(memory, A) == ["TRUST-01"]
    assert not memory.exists()


# --- the memory ------------------------------------------------------------------------------------------------------


def test_the_memory_is_the_sites_own_and_replaced_in_one_step(memory: Path) -> None:
    judge(memory, A, p=NOW)
    old = memory.stat().st_ino
    judge(memory, B, p=NOW + 1)
    assert memory.stat().st_mode & 0o777 == 0o600 and memory.stat().st_ino != old
    assert [file.name for file in memory.parent.iterdir()] == ["publishers.json"]
    assert json.loads(memory.read_text()) == {"p": {"bundle": B, "signed_at": NOW + 1}}


def test_without_its_memory_a_site_has_the_signatures_age_alone(memory: Path) -> None:
    judge(memory, A, p=NOW)
    memory.unlink()
    assert judge(memory, B, p=NOW - 179 * DAY) == []


SPOILED = [
    "", "{", "[]", '{"p": 1}', '{"p": {"bundle": "a"}}', '{"p": {"bundle": "a", "signed_at": "1"}}',
    '{"p": {"bundle": "a", "signed_at": true}}', '{"p": {"bundle": 1, "signed_at": 1}}', "\xff",
]  # fmt: skip


@pytest.mark.parametrize("text", SPOILED)
def test_a_memory_that_cannot_be_read_lets_nothing_run_and_stays_for_a_person_to_see(memory: Path, text: str) -> None:
    memory.parent.mkdir()
    memory.write_bytes(text.encode("latin-1"))
    [reason] = refusals(A, {"p": NOW}, memory, NOW, DAYS)
    assert reason.code == "TRUST-09" and str(memory) in reason.found and "delete" in reason.fix
    assert memory.read_bytes() == text.encode("latin-1")


def test_what_cannot_be_remembered_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "publishers.json").mkdir()
    assert judge(tmp_path / "publishers.json", A, p=NOW) == ["TRUST-09"]
    (tmp_path / ".publishers.json.new").mkdir()
    assert judge(tmp_path / "publishers.json", A, p=NOW) == ["TRUST-09"]
    (tmp_path / "publishers.json").rmdir()
    assert judge(tmp_path / "publishers.json", A, p=NOW) == ["TRUST-09"], "there is none, and none can be made"


@pytest.mark.parametrize(("setting", "number"), [("", 180), (" ", 180), ("1", 1), ("400", 400), ("36500", 36_500)])
def test_the_setting_is_a_number_of_days(setting: str, number: int) -> None:
    assert days(setting) == number


@pytest.mark.parametrize("setting", ["0", "-1", "36501", "half a year", "1.5", "1e3", "180d", "never"])
def test_a_setting_with_a_slip_is_told_and_not_taken_for_no_limit(setting: str) -> None:
    reason = days(setting)
    assert isinstance(reason, Refusal) and reason.code == "TRUST-04" and setting in reason.found


# --- in Flower's SuperNode -------------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Ed25519PrivateKey:
    return publisher_key(tmp_path / "publisher.key")


def supernode(folder: Path, code: str, config: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """bouquet/flower/supernode.py with this code in place of Flower's loop: what Flower would find."""
    config = f'cache-path="{folder}/cache"' if config is None else config
    program = f"""
import json, runpy, sys
from flwr.supercore.fab import Fab
from flwr.supernode import cli, start_client_internal as flower
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["supernode.py", "--trusted-entities={folder}/trusted.yaml", '--node-config={config}']
{code}
runpy.run_module("bouquet.flower.supernode", run_name="__main__")
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENT, cwd=folder, env={"PATH": "", **env})


ASK = """
import yaml
def ask():
    for fab in json.load(open("fabs.json")):
        fab = Fab("", fab["content"].encode(), fab["verifications"])
        taken = flower._verify_fab(fab, yaml.safe_load(open("trusted.yaml")))
        print("answer", taken, flower.FAB_VERIFICATION_ERROR.code, flower.FAB_VERIFICATION_ERROR.reason)
cli.flower_supernode = ask
"""


@pytest.mark.slow
def test_flowers_check_asks_for_the_age_and_its_error_says_what_was_wrong(
    tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    now = int(time.time())
    cases = [("new", now), ("old", now - 200 * DAY), ("before", now - 60), ("ahead", now + 2 * DAY), ("new", now - 200)]
    fabs = []
    for content, when in cases:
        digest = sign(content.encode(), key, tmp_path / "signatures", again=True, now=when).stem
        fabs.append({"content": content, "verifications": signatures(digest, tmp_path / "signatures")})
    (tmp_path / "fabs.json").write_text(json.dumps(fabs))
    done = supernode(tmp_path, ASK)
    assert re.findall(r"^answer (True|False) 7 (?:The|(\S+)  \S)", done.stdout, re.MULTILINE) == [
        ("True", ""), ("False", "TRUST-06"), ("False", "TRUST-07"), ("False", "TRUST-08"), ("True", "TRUST-08")
    ], done.stdout + done.stderr  # fmt: skip
    assert f"trust: bundles signed within 180 days by {publisher_id(key.public_key())}\n" in done.stdout
    for code, found in (("06", "200.0 days ago"), ("07", "60 s before"), ("08", "2.0 days ahead")):
        report = rf"^TRUST-{code}  .*\n  found  .*{found}.*\n  fix    .*--again.*\n  help   "
        assert re.search(report, done.stdout, re.MULTILINE)
    public = "".join(line for line in done.stdout.splitlines() if line.startswith("answer"))
    assert "fpk_" not in public and str(tmp_path) not in public


@pytest.mark.slow
def test_what_a_hub_writes_in_place_of_a_signature_is_no_signature_and_ends_nothing(
    tmp_path: Path, key: Ed25519PrivateKey
) -> None:
    good = json.loads(sign(b"new", key, tmp_path / "signatures").read_text())[publisher_id(key.public_key())]
    spoiled = ["", "{", "[]", "1", "{}", "[" * 100_000, json.dumps({"signature": good["signature"]})]
    spoiled += [json.dumps(good | {"signed_at": at}) for at in ("1", None, -1, 2**64, 1.5, True, [])]
    spoiled += [json.dumps(good | {"signature": text}) for text in ("", "é", "A", "AAAA", 1, None)]
    publisher = publisher_id(key.public_key())
    records = [{publisher: text, "valid_license": "Valid"} for text in [*spoiled, json.dumps(good)]]
    fabs = [{"content": "new", "verifications": record} for record in records]
    (tmp_path / "fabs.json").write_text(json.dumps(fabs))
    done = supernode(tmp_path, ASK)
    answers = re.findall(r"^answer (True|False)", done.stdout, re.MULTILINE)
    assert answers == ["False"] * len(spoiled) + ["True"], done.stdout + done.stderr
    assert done.stdout.count("\nTRUST-01  ") == len(spoiled)


@pytest.mark.parametrize(
    "altered",
    ["flower._verify_fab", "flower.FAB_VERIFICATION_ERROR", "None"],
)
def test_a_site_does_not_start_with_a_flower_that_would_never_ask(
    tmp_path: Path, key: Ed25519PrivateKey, altered: str
) -> None:
    code = f"def other(): return {altered}\nflower._pull_and_store_message = other\n"
    done = supernode(tmp_path, code + "cli.flower_supernode = lambda: print('it started')")
    assert done.returncode == 1 and done.stderr.startswith("FLWR-01  ") and "it started" not in done.stdout


@pytest.mark.parametrize(
    ("config", "setting", "said"),
    [
        (None, "0", "TRUST-04  The site's own limits cannot be read."),
        ('site-name="x"', "", "SITE-12  The site does not say where its data are."),
    ],
)
def test_a_site_that_cannot_promise_the_age_does_not_start(
    tmp_path: Path, key: Ed25519PrivateKey, config: str | None, setting: str, said: str
) -> None:
    done = supernode(tmp_path, "cli.flower_supernode = lambda: print('it started')", config, SITE_TRUST_DAYS=setting)
    assert done.returncode == 1 and said in done.stderr and "it started" not in done.stdout


# --- signing that keeps up -------------------------------------------------------------------------------------------


def signed_at(file: Path) -> int:
    [record] = json.loads(file.read_text()).values()
    return record["signed_at"]


@pytest.mark.parametrize(
    ("age", "renewed"), [(0, False), (90 * 86_400, False), (90 * 86_400 + 1, True), (-86_400, False), (-86_401, True)]
)
def test_a_signature_is_made_anew_when_half_its_time_is_over_or_its_clock_was_wrong(
    tmp_path: Path, key: Ed25519PrivateKey, age: int, renewed: bool
) -> None:
    sign(b"a bundle", key, tmp_path / "signatures", now=NOW - age)
    assert signed_at(sign(b"a bundle", key, tmp_path / "signatures", now=NOW)) == (NOW if renewed else NOW - age)


def test_signing_again_makes_a_bundle_the_newest(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    sign(b"a bundle", key, tmp_path / "signatures", now=NOW - 10)
    assert signed_at(sign(b"a bundle", key, tmp_path / "signatures", now=NOW, again=True)) == NOW


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("signatures") / "bouquet")


@pytest.fixture
def hub(root: Path) -> Path:
    """A checkout whose publisher has its key, and no signature."""
    sh("rm -rf certs/publisher.* certs/trusted.yaml .bouquet/signatures", root)
    publisher_key(root / "certs/publisher.key")
    return root


def here(root: Path, ago: int) -> Path:
    """A signature under the checkout's bundle, so many days and an hour old."""
    key, now = publisher_key(root / "certs/publisher.key"), int(time.time()) - ago * DAY - 3600
    return sign(bundle.build(root), key, root / ".bouquet/signatures", again=True, now=now)


def test_the_command_tells_how_long_a_signature_is_good_and_renews_an_old_one(hub: Path) -> None:
    file = here(hub, 60)
    before = file.read_bytes()
    until = time.strftime("%Y-%m-%d", time.gmtime(signed_at(file) + 180 * 86_400))
    assert f"sites take it for 119 more days, until {until}" in sh("scripts/bouquet hub sign", hub).stdout
    assert file.read_bytes() == before
    here(hub, 100)
    assert "sites take it for 180 more days" in sh("scripts/bouquet hub sign", hub).stdout


def test_the_command_says_that_another_bundle_is_newer_and_again_mends_it(hub: Path) -> None:
    file = here(hub, 1)
    sign(b"another bundle", publisher_key(hub / "certs/publisher.key"), file.parent)
    assert "sign: 1 signed later" in sh("scripts/bouquet hub sign", hub).stdout
    assert "signed later" not in sh("scripts/bouquet hub sign --again", hub).stdout


def test_a_public_key_of_another_kind_is_no_publishers(tmp_path: Path) -> None:
    """The private one is elsewhere, and what lies beside it is a site's key: Flower signs with Ed25519 alone."""
    (tmp_path / "publisher.key").mkdir()  # not to be read
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    (tmp_path / "publisher.pub").write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    with pytest.raises(BouquetError, match="TRUST-02"):
        sign_all([b"bundle"], tmp_path / "publisher.key", tmp_path / "signatures", again=False, now=NOW)


def test_checkouts_of_one_command_have_one_time(hub: Path, tmp_path: Path) -> None:
    sh(f"cp -r app pyproject.toml {tmp_path} && echo >>{tmp_path}/app/__init__.py", hub)
    here(hub, 1)
    sh(f"scripts/bouquet hub sign --again . {tmp_path}", hub)
    times = [signed_at(file) for file in (hub / ".bouquet/signatures").iterdir()]
    assert len(times) == 2 and times[0] == times[1]


@pytest.mark.slow
def test_a_hub_without_the_key_hears_when_the_signature_ends_and_then_that_the_key_is_elsewhere(hub: Path) -> None:
    files = {ago: here(hub, ago).read_bytes() for ago in (181, 100)}
    file = here(hub, 0)
    (hub / "certs/publisher.key").unlink()
    file.write_bytes(files[100])
    assert "sites take it for 79 more days" in sh("scripts/bouquet hub sign", hub).stdout
    assert "TRUST-02" in sh("scripts/bouquet hub sign --again", hub, check=False).stdout
    assert file.read_bytes() == files[100]
    file.write_bytes(files[181])
    done = sh("scripts/bouquet hub sign", hub, check=False)
    assert done.returncode == 1 and done.stdout.startswith("TRUST-02  The publisher's private key is not here.")
