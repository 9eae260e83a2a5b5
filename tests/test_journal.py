"""A site's own record of what it sent."""

from __future__ import annotations

import subprocess
import sys

from safetensors.torch import load_file

from app import model
from app.adapter import store
from app.site import journal
from bouquet import ROOT
from tests.kit import tiny


def test_a_line_that_was_cut_off_does_not_spoil_those_before_it(tmp_path):
    journal.note(tmp_path, round=1, sent="a")
    journal.note(tmp_path, round=2, sent="b")
    whole = (tmp_path / journal.FILE).read_bytes()
    (tmp_path / journal.FILE).write_bytes(whole[:-5])
    assert [(line["round"], line["sent"]) for line in journal.read(tmp_path)] == [(1, "a")]
    assert journal.read(tmp_path / "nowhere") == []


def test_every_message_of_a_run_is_noted_with_the_hash_of_what_was_applied_and_sent(finished):
    federation, folder = finished
    for site in ("site-1", "site-2"):
        lines = journal.read(federation.root / "cache" / site)
        rounds = federation.history()["rounds"]
        assert [line["round"] for line in lines] == [1, 2, 3] and {line["run"] for line in lines} == {"7"}
        assert [line["sent"] for line in lines] == [r["adapters"][site] for r in rounds] + [""]
        assert [line["applied"] for line in lines] == [r["started_from"] for r in rounds] + [rounds[-1]["adapter"]]
        assert not (federation.root / "cache" / site / "sent").exists()


def test_what_was_sent_is_kept_where_the_site_asks_for_it(federation, monkeypatch):
    monkeypatch.setenv("BOUQUET_KEEP_SENT", "1")
    folder = federation.go(monkeypatch)
    kept = {
        s: load_file(federation.root / "cache" / s / "sent" / f"{h}.safetensors")
        for s, h in federation.history()["rounds"][0]["adapters"].items()
    }
    assert all(
        model.adapter_hash(adapter) == h
        for adapter, h in zip(kept.values(), federation.history()["rounds"][0]["adapters"].values(), strict=True)
    )
    weights = {site: numbers["weight"] for site, numbers in federation.history()["rounds"][0]["sites"].items()}
    for key, value in store.read_adapter(folder / "final").items():
        mean = sum(kept[s][key].double() * w for s, w in weights.items()) / sum(weights.values())
        assert (value.double() - mean).abs().max() < 1e-6
    assert tiny.equal(store.read_adapter(folder / "final"), store.read_adapter(folder / "round-0001"))


def entry(run: str, number: int, sent: str, minute: int) -> dict:
    return {
        "time": 1_795_000_000.0 + 60 * minute,
        "run": run,
        "round": number,
        "images": 365,
        "applied": "aa11" * 16,
        "sent": sent,
    }


def test_a_site_is_told_in_words_what_it_did_round_by_round():
    entries = [entry("7", 1, "bb22" * 16, 0), entry("7", 2, "", 1), entry("8", 1, "cc33" * 16, 2)]
    assert journal.told(entries, now=1_795_000_000.0 + 120) == [
        "run 7  trained in 1 rounds, measured in 1 more, from 2026-11-18 11:06 UTC to 2026-11-18 11:07 UTC",
        "  round 1  2026-11-18 11:06 UTC  took adapter aa11aa11, trained on 365 photos and sent adapter bb22bb22",
        "  round 2  2026-11-18 11:07 UTC  took adapter aa11aa11, measured the adapter and sent numbers alone",
        "run 8  trained in 1 rounds, measured in 0 more, from 2026-11-18 11:08 UTC to 2026-11-18 11:08 UTC",
        "  round 1  2026-11-18 11:08 UTC  took adapter aa11aa11, trained on 365 photos and sent adapter cc33cc33",
        "in the last seven days: 2 runs, 3 messages",
    ]
    assert (
        journal.told(entries, now=1_795_000_000.0 + journal.WEEK + 90)[-1]
        == "in the last seven days: 1 runs, 1 messages"
    )
    assert journal.told([], now=0) == ["this site has answered no message yet"]


def test_of_a_long_run_the_latest_rounds_are_told_and_nothing_of_a_line_moves_the_cursor():
    told = journal.told([entry("7\x1b[2J", number, "", number) for number in range(1, 101)], now=0)
    assert (
        len(told) == 1 + 1 + journal.SHOWN + 1
        and told[1] == f"  80 earlier rounds are in {journal.FILE}"
        and told[2].startswith("  round 81  ")
    )
    assert "\x1b" not in "".join(told)


def test_a_line_that_a_power_cut_has_spoilt_is_none_and_those_after_it_count(tmp_path):
    journal.note(tmp_path, run="7", round=1, sent="")
    with (tmp_path / journal.FILE).open("ab") as file:
        file.write(b"\0" * 40 + b"\n" + b"\xff{}\n" + b"[1]\n" + b'"text"\n')
    journal.note(tmp_path, run="7", round=2, sent="")
    assert [line["round"] for line in journal.read(tmp_path)] == [1, 2]


def test_the_reader_is_a_command_that_needs_neither_torch_nor_a_model(tmp_path):
    journal.note(tmp_path, run="7", round=1, sent="", images=3, applied="aa")
    code = (
        f"import sys; from bouquet import cli; assert cli.main(['site', 'journal', {str(tmp_path)!r}]) == 0; assert"
        " 'torch' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert shown.startswith("run 7  trained in 0 rounds, measured in 1 more, ") and shown.endswith(
        "in the last seven days: 1 runs, 1 messages\n"
    )
