"""The audit log: a chain of lines by hand, and what is found when somebody, or a kill, has been at it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import audit, bundle
from bouquet import ROOT, cli
from bouquet import audit as commands
from bouquet.hub import sign


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def log(tmp_path) -> Path:
    """A log of four lines: its beginning and three deeds."""
    file = tmp_path / "audit.jsonl"
    for name in ("garden", "clinic", "museum"):
        audit.append(file, did="invited", site=name)
    return file


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def elsewhere(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Another process that writes a log."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT)


def test_each_line_has_the_hash_of_the_line_before_it_and_the_first_names_the_log(log):
    first, *rest = [line.rstrip(b"\n") for line in lines(log)]
    begun = json.loads(first)
    assert begun["did"] == "began" and len(begun["log"]) == 32 and begun["prev"] == sha(b"")
    assert [json.loads(line)["prev"] for line in rest] == [sha(first), sha(rest[0]), sha(rest[1])]
    found = audit.check(log.read_bytes())
    assert (found.log, found.head, found.faults, found.torn) == (begun["log"], sha(rest[2]), (), ())
    assert [entry["site"] for entry in found.entries[1:]] == ["garden", "clinic", "museum"]
    assert all(entry["by"] == audit.who() and entry["time"] > 1.7e9 for entry in found.entries)
    assert audit.append(log, did="admitted") == audit.check(log.read_bytes()).head


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda was: [was[0], was[1].replace(b"garden", b"gordon"), *was[2:]], "line 3: it does not follow"),
        (lambda was: [was[0], *was[2:]], "line 2: it does not follow"),
        (lambda was: [was[0], was[2], was[1], was[3]], "line 2: it does not follow"),
        (lambda was: was[1:], "line 1: the log does not begin here"),
        (lambda was: [b'{"did": "x"}\n', *was], "line 2: the log does not begin here"),
        (lambda was: [*was[:2], b'{"did": "x"}\n', *was[2:]], "line 4: what stands before it is no line of this log"),
        (lambda was: [*was[:2], was[2][:20] + b"\n", was[3]], "line 4: what stands before it is no line of this log"),
        (lambda was: [b'{"did": "x"}\n'], "it has no chain"),
    ],
    ids=["changed", "cut", "reordered", "beginning cut", "put before", "put in", "spoilt", "none"],
)
def test_a_line_that_was_changed_cut_put_in_or_moved_is_found_where_it_was(change, where, log):
    log.write_bytes(b"".join(change(lines(log))))
    assert audit.check(log.read_bytes()).faults[0].startswith(where)


def test_an_end_that_was_cut_off_leaves_a_chain_that_holds_and_lacks_the_head_that_was_kept(log):
    kept = audit.check(log.read_bytes()).head
    log.write_bytes(b"".join(lines(log)[:-1]))
    found = audit.check(log.read_bytes())
    assert found.faults == () and kept not in found.hashes
    audit.append(log, did="invited", site="museum")
    assert kept not in audit.check(log.read_bytes()).hashes


KILLED = """
import os, signal, sys
from pathlib import Path
from app import audit
def half(target, data, write=os.write):
    write(target, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
audit.append(Path(sys.argv[1]), did="revoked", site="clinic")
"""


def test_a_kill_in_the_middle_of_a_write_is_named_and_the_log_goes_on_after_it(log):
    assert elsewhere(KILLED, log).wait() == -signal.SIGKILL
    piece = lines(log)[-1]
    assert not piece.endswith(b"\n") and piece.startswith(b'{"time"')
    cut = audit.check(log.read_bytes())
    assert cut.torn == (f"at the end: {len(piece)} bytes of a line whose writing was cut off",) and cut.faults == ()
    audit.append(log, did="revoked", site="clinic")
    found = audit.check(log.read_bytes())
    assert found.torn == (f"before line 6: {len(piece) + 1} bytes of a line whose writing was cut off",)
    assert found.faults == () and len(found.entries) == 5
    assert found.entries[-1]["prev"] == cut.head and found.entries[-1]["torn"] == sha(piece + b"\n")


def test_a_piece_that_a_kill_left_covers_no_line_that_is_taken_out_before_it(log):
    assert elsewhere(KILLED, log).wait() == -signal.SIGKILL
    audit.append(log, did="revoked", site="clinic")
    was = lines(log)
    log.write_bytes(b"".join([*was[:3], *was[4:]]))
    assert audit.check(log.read_bytes()).faults


def test_two_processes_that_write_at_once_make_one_chain(log):
    code = """
import sys
from pathlib import Path
from app import audit
for number in range(40):
    audit.append(Path(sys.argv[1]), did="asked", number=number, process=sys.argv[2])
"""
    both = [elsewhere(code, log, number) for number in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    found = audit.check(log.read_bytes())
    assert (found.faults, found.torn, len(found.entries)) == ((), (), 4 + 80)
    for one in ("1", "2"):
        assert [entry["number"] for entry in found.entries if entry.get("process") == one] == list(range(40))


def test_a_full_disk_leaves_the_log_as_it_was(log, monkeypatch):
    before, write = log.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda target, data: write(target, data[:10]))
    with pytest.raises(OSError, match="a part of the line"):
        audit.append(log, did="invited", site="opera")
    assert log.read_bytes() == before


def test_lines_from_before_there_was_a_chain_are_in_the_hash_that_it_begins_with(tmp_path):
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b'{"run": "7", "round": 1}\n{"run": "7", "rou')
    audit.append(file, did="approved", run="8")
    found = audit.check(file.read_bytes())
    assert (found.earlier, found.faults, found.torn) == (2, (), ())
    assert found.entries[0]["prev"] == sha(b'{"run": "7", "round": 1}\n{"run": "7", "rou\n')
    file.write_bytes(file.read_bytes().replace(b'"round": 1', b'"round": 2'))
    assert audit.check(file.read_bytes()).faults


# --- the hub's logs, and the command
# -----------------------------------------------------------------------------------


def told(capsys, *words: object, code: int = 0) -> tuple[str, str]:
    """What `bouquet audit` prints, and says on standard error."""
    assert cli.main(["audit", *map(str, words)]) == code
    return capsys.readouterr()


def test_the_command_tells_the_deeds_in_words_and_the_head_to_keep(log, capsys):
    out, _ = told(capsys, log)
    head = audit.check(log.read_bytes()).head
    shown = out.splitlines()
    assert shown[0].startswith(f"log      {log}   id ") and shown[-1] == f"head     {head}   4 lines"
    assert shown[2].endswith(f" UTC  {audit.who()}  invited  site=garden")
    as_json = json.loads(told(capsys, log.parent, "--json", "--head", head)[0])["logs"]
    assert [(one["file"], one["head"], one["faults"]) for one in as_json] == [(str(log), head, [])]


def test_the_command_ends_with_1_for_a_changed_log_and_for_one_that_lacks_the_kept_head(log, capsys):
    head, whole = audit.check(log.read_bytes()).head, lines(log)
    log.write_bytes(b"".join(whole[:-1]))
    assert "head     " in told(capsys, log)[0]
    assert f"no line has the hash {head}" in told(capsys, log, "--head", head, code=1)[1]
    log.write_bytes(b"".join([whole[0], whole[1].replace(b"garden", b"gordon"), *whole[2:]]))
    out, err = told(capsys, log, code=1)
    assert "changed  line 3: it does not follow" in out
    assert err.startswith("AUDIT-01  The audit log is not as it was written.")
    assert told(capsys, log.parent / "none", code=1)[1].startswith("AUDIT-02  There is no audit log here.")


def test_nothing_that_a_log_holds_moves_the_cursor(log, capsys):
    audit.append(log, did="refused", site="a\x1b[2J\nhead     none")
    assert "\x1b" not in told(capsys, log)[0] and "\nhead     none" not in told(capsys, log)[0]


def test_the_hub_logs_whom_it_admits_and_revokes_and_a_log_that_cannot_be_written_undoes_nothing(tmp_path, capsys):
    commands.note(tmp_path / "admitted", "admitted", site="garden", key="SHA256:x", images=None)
    commands.note(tmp_path / "admitted", "revoked", site="garden")
    found = audit.check((tmp_path / "admitted" / commands.FILE).read_bytes()).entries
    assert [(entry["did"], entry.get("site")) for entry in found] == [
        ("began", None), ("admitted", "garden"), ("revoked", "garden")
    ]  # fmt: skip
    (tmp_path / "file").write_text("")
    commands.note(tmp_path / "file", "revoked", site="garden")
    assert capsys.readouterr().err.startswith("note   not in the audit log: revoked (")


def test_signing_is_a_line_beside_the_keys_with_the_bundles_hash(tmp_path, capsys):
    sign.sign_and_tell([ROOT], tmp_path / "certs" / "publisher.key", tmp_path / "signatures")
    (_, entry) = audit.check((tmp_path / "certs" / "admitted" / commands.FILE).read_bytes()).entries
    assert (entry["did"], entry["bundle"]) == ("signed", sha(bundle.build(ROOT)))
    assert f"bundle {entry['bundle'][:12]}  publisher {entry['publisher']}" in capsys.readouterr().out


def test_a_run_is_logged_from_its_start_to_its_end_with_the_hashes_of_config_bundle_and_adapters(finished):
    federation, folder = finished
    found = audit.check((federation.adapters / commands.FILE).read_bytes())
    assert found.faults == () and {entry.get("run", "7") for entry in found.entries} == {"7"}
    begun, one, two, exported, ended = found.entries[1:]
    history = federation.history()
    config = sha(json.dumps(history["config"], sort_keys=True).encode())
    assert (begun["did"], begun["config"], begun["base"]) == ("run started", config, history["base"]["fingerprint"])
    assert begun["bundle"] == sha(bundle.build(ROOT))
    assert [(entry["did"], entry["round"], entry["adapter"]) for entry in (one, two)] == [
        ("round", entry["round"], entry["adapter"]) for entry in history["rounds"]
    ]
    assert (exported["did"], exported["adapter"]) == ("exported", history["rounds"][1]["adapter"])
    assert (ended["did"], ended["state"], ended["code"]) == ("run ended", "finished", "")


def test_a_run_that_failed_is_logged_with_its_code(federation, monkeypatch):
    federation.run_config["sites"] = "site-1,site-9"
    federation.fails(monkeypatch, "HUB-10")
    entries = audit.check((federation.adapters / commands.FILE).read_bytes()).entries
    assert [(entry["did"], entry.get("code")) for entry in entries[1:]] == [
        ("run started", None), ("run ended", "HUB-10")
    ]  # fmt: skip
