"""A site's own record of what it sent."""

from __future__ import annotations

from safetensors.torch import load_file

from app import checkpoint, journal, model
from tests import tiny


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
    kept = {s: load_file(federation.root / "cache" / s / "sent" / f"{h}.safetensors") for s, h in federation.history()["rounds"][0]["adapters"].items()}
    assert all(model.adapter_hash(adapter) == h for adapter, h in zip(kept.values(), federation.history()["rounds"][0]["adapters"].values(), strict=True))
    weights = {site: numbers["weight"] for site, numbers in federation.history()["rounds"][0]["sites"].items()}
    for key, value in checkpoint.read_adapter(folder / "final").items():
        mean = sum(kept[s][key].double() * w for s, w in weights.items()) / sum(weights.values())
        assert (value.double() - mean).abs().max() < 1e-6
    assert tiny.equal(checkpoint.read_adapter(folder / "final"), checkpoint.read_adapter(folder / "round-0001"))
