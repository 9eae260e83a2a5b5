"""Which sites a run asks, and whether a site's operator wants a part in it; hub and sites in one process."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from app import audit, bundle
from app.config import RunConfig
from app.errors import ConfigError, SiteError
from app.site import consent, journal
from bouquet import ROOT, cli
from bouquet.hub import status
from tests.kit.memory import FakeTime, Federation

RUN = RunConfig.read({"rounds": 2, "batch-size": 8, "gradient-accumulation": 2, "learning-rate": 0.01})


def asked(cached: Path, run: str = "7", config: RunConfig = RUN, code: str = "ab" * 32, base: str = "cd" * 32):
    return consent.asked(cached, run, config, code, base, "max-rounds=8")


def answer(cached: Path, how: str, what: consent.Asked) -> str:
    """The code of what a run is answered, or nothing where it may go on."""
    try:
        consent.obtain(cached, how, what)
    except SiteError as error:
        return error.code
    return ""


def deeds(cached: Path) -> list[str]:
    return [entry["did"] for entry in audit.check((cached / journal.FILE).read_bytes()).entries[1:]]


# --- at a site
# ---------------------------------------------------------------------------------------------------------


def test_a_run_that_asks_waits_until_the_operator_has_decided(tmp_path):
    assert answer(tmp_path, "ask", asked(tmp_path)) == answer(tmp_path, "ask", asked(tmp_path)) == "TRUST-11"
    file = tmp_path / consent.FOLDER / "7.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and json.loads(file.read_text())["state"] == "waiting"
    consent.decide(tmp_path, consent.find(tmp_path, "7"), consent.APPROVED)
    assert answer(tmp_path, "ask", asked(tmp_path)) == ""
    consent.decide(tmp_path, consent.find(tmp_path, "7"), consent.DECLINED)
    assert answer(tmp_path, "ask", asked(tmp_path)) == "TRUST-12"
    assert consent.find(tmp_path, "7").by == audit.who()
    assert deeds(tmp_path) == ["asked", "approved", "declined"] and journal.read(tmp_path) == []


def test_what_was_approved_is_what_was_asked_and_nothing_else(tmp_path):
    answer(tmp_path, "ask", asked(tmp_path))
    consent.decide(tmp_path, consent.find(tmp_path, "7"), consent.APPROVED)
    for other in ({"config": replace(RUN, local_steps=61)}, {"code": "ac" * 32}, {"base": "ce" * 32}):
        assert answer(tmp_path, "ask", asked(tmp_path, **other)) == "TRUST-11"
    assert answer(tmp_path, "ask", asked(tmp_path)) == "TRUST-11"  # the last decision is gone with what it was about


def test_same_approves_what_equals_an_approved_run_but_for_seed_and_resume(tmp_path):
    assert answer(tmp_path, "same", asked(tmp_path)) == "TRUST-11"
    consent.decide(tmp_path, consent.find(tmp_path, "7"), consent.APPROVED)
    again = replace(RUN, seed=43, resume="7")
    assert answer(tmp_path, "ask", asked(tmp_path, "8", again)) == "TRUST-11"
    assert answer(tmp_path, "same", asked(tmp_path, "8", again)) == ""
    assert (consent.find(tmp_path, "8").like, consent.find(tmp_path, "8").by) == ("7", "")
    for number, other in enumerate(({"config": replace(RUN, rounds=3)}, {"code": "ac" * 32}, {"base": "ce" * 32})):
        assert answer(tmp_path, "same", asked(tmp_path, str(9 + number), **other)) == "TRUST-11"


ODD = ("une fleur\u00a0: rouge", "赤い花\u3000背景", "foto\u00ad", "\U0001f468\u200d\U0001f469", "e\ue000")


@pytest.mark.parametrize("prompts", ODD)
@pytest.mark.parametrize("how", ["ask", "same"])
def test_a_decision_holds_for_a_run_whose_texts_have_characters_that_are_not_printed(prompts, how, tmp_path):
    config = RunConfig.read({"sample-prompts": prompts, "trigger-word": "a\u00a0b"})
    for run, state, code in (("7", consent.APPROVED, ""), ("8", consent.DECLINED, "TRUST-12")):
        what = {"run": run, "config": replace(config, rounds=int(run))}
        assert answer(tmp_path, how, asked(tmp_path, **what)) == "TRUST-11"
        consent.decide(tmp_path, consent.find(tmp_path, run), state)
        assert [answer(tmp_path, how, asked(tmp_path, **what)) for _ in range(3)] == [code] * 3
    assert deeds(tmp_path) == ["asked", "approved", "asked", "declined"]
    assert answer(tmp_path, "same", asked(tmp_path, "9", replace(config, rounds=7, seed=43))) == ""


def test_texts_that_look_alike_once_they_are_read_back_are_not_the_same_run(tmp_path):
    """A soft hyphen and a joiner both come back as �."""
    one, other = (RunConfig.read({"trigger-word": f"foto{character}"}) for character in "\u00ad\u200d")
    answer(tmp_path, "ask", asked(tmp_path, config=one))
    consent.decide(tmp_path, consent.find(tmp_path, "7"), consent.APPROVED)
    assert answer(tmp_path, "same", asked(tmp_path, "8", other)) == "TRUST-11"
    assert answer(tmp_path, "ask", asked(tmp_path, config=other)) == "TRUST-11"


def test_a_decision_of_before_hashes_were_kept_goes_on_to_hold(tmp_path):
    file = tmp_path / consent.FOLDER / "7.json"
    consent.write(tmp_path, replace(asked(tmp_path), state=consent.APPROVED, decided=1.0))
    told = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in told.items() if not key.endswith("_sha256")}))
    assert answer(tmp_path, "ask", asked(tmp_path)) == ""
    assert answer(tmp_path, "same", asked(tmp_path, "8", replace(RUN, seed=43))) == ""
    assert consent.find(tmp_path, "8").like == "7"


def test_same_follows_the_newest_decision_on_such_a_run(tmp_path):
    for number, state in enumerate((consent.APPROVED, consent.DECLINED)):
        consent.write(tmp_path, replace(asked(tmp_path, str(number)), state=state, decided=float(number)))
    assert answer(tmp_path, "same", asked(tmp_path, "8")) == "TRUST-11"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"state": "approved"}', b'{"version": 99}'])
def test_a_decision_that_cannot_be_read_approves_nothing(content, tmp_path):
    consent.write(tmp_path, replace(asked(tmp_path), state=consent.APPROVED))
    (tmp_path / consent.FOLDER / "7.json").write_bytes(content)
    assert answer(tmp_path, "ask", asked(tmp_path)) == "TRUST-11"


def test_always_asks_nobody_and_a_slip_is_none_of_the_choices(tmp_path):
    assert [consent.mode({}), consent.mode({"SITE_CONSENT": ""}), consent.mode({"SITE_CONSENT": "Same"})] == [
        "always", "always", "same"
    ]  # fmt: skip
    with pytest.raises(SiteError, match="CHECK-09") as caught:
        consent.mode({"SITE_CONSENT": "never"})
    assert "SITE_CONSENT=never" in caught.value.report()


def test_the_operator_reads_in_plain_words_what_a_run_asks_for(tmp_path):
    (tmp_path / consent.PUBLISHERS).write_text(json.dumps({"fpk_1": {"bundle": "ab" * 32, "signed_at": 1}}))
    told = consent.words(replace(asked(tmp_path), since=1_795_000_000.0))
    assert told == [
        "run 7  waits for your decision since 2026-11-18 11:06 UTC",
        '  base model  "mini", fingerprint cdcdcdcdcdcd',
        "  code        bundle abababababab, signed by fpk_1",
        "  training    2 rounds of 30 steps, 16 images a step, at 64 pixels, an adapter of rank 16",
        "  also        learning-rate=0.01",
        "  limits      SITE_LIMITS: max-rounds=8; where photos are private also min-held-out 8, min-photos 8,"
        " min-step-images 4, min-local-steps 4, max-runs-a-week 50, max-messages-a-week 2000, unless that says"
        " otherwise",
        "  leaves      after each round the adapter (fp32): the hub sees this site's own; rounded numbers: losses,"
        " counts, seconds, GPU figures; your site's and GPU's name, error codes",
        "  stays       photos, captions, file names, your site's secret, this decision's file and the journal",
    ]


def also(tmp_path: Path, **values) -> str:
    return consent.words(asked(tmp_path, config=RunConfig.read({k.replace("_", "-"): v for k, v in values.items()})))[4]


def test_a_text_of_a_run_is_quoted_so_that_it_passes_for_no_other_setting(tmp_path):
    evil = 'petals, secrecy=masks, dp-noise=4", dp-noise="4'
    assert also(tmp_path, trigger_word=evil) == (
        r'  also        trigger-word="petals, secrecy=masks, dp-noise=4\", dp-noise=\"4"'
    )
    assert also(tmp_path, trigger_word="un\u202epetal", sites="été,b") == (
        '  also        trigger-word="un�petal", sites="été,b"'
    )
    config = RunConfig.read({"base-model": "mini, fingerprint 00"})
    assert consent.words(asked(tmp_path, config=config))[1] == (
        '  base model  "mini, fingerprint 00", fingerprint cdcdcdcdcdcd'
    )


def test_no_text_of_a_run_is_so_long_that_a_number_is_cut_off(tmp_path):
    assert also(tmp_path, sample_prompts="|" * 9000, sites="a,b" + " " * 3997, sample_steps=7, dp_noise=2.0).startswith(
        "  also        dp-noise=2.0, sample-steps=7, sites="
    )


def test_whether_the_hub_sees_a_sites_own_adapter_is_said_of_every_run(tmp_path):
    masks = RunConfig.read({"secrecy": "masks", "min-sites": 3, "norm-bound": 0.0})
    for config, seen in (
        (RUN, "the hub sees this site's own"),
        (masks, "the hub sees only its sum with other sites' (secrecy=masks)"),
    ):
        assert consent.words(asked(tmp_path, config=config))[6].startswith(
            f"  leaves      after each round the adapter (fp32): {seen}; rounded numbers: losses"
        )


def test_nothing_that_a_hub_writes_into_a_run_moves_the_cursor(tmp_path):
    what = asked(tmp_path)
    evil = replace(what, config=what.config | {"base_model": "mini\x1b[2J", "sites": "a\nrun 9  approved"})
    assert not any("\x1b" in line or "\n" in line for line in consent.words(evil))


def test_the_operators_commands_list_approve_and_decline(tmp_path, capsys):
    def does(*words: str) -> str:
        assert cli.main(["site", *words, str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert does("runs") == "no run has asked this site; a run asks where SITE_CONSENT is ask or same\n"
    answer(tmp_path, "ask", asked(tmp_path))
    assert does("runs").startswith("run 7  waits for your decision since ")
    assert does("approve", "7").splitlines()[-1].startswith("run 7  approved ")
    assert answer(tmp_path, "ask", asked(tmp_path)) == ""
    assert does("decline", "7").splitlines()[-1].startswith("run 7  declined ")
    assert does("runs").startswith("run 7  declined ") and does("runs").endswith(f", by {audit.who()}\n")
    assert cli.main(["site", "approve", "8", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("TRUST-13  No such run has asked for consent here.")
    assert cli.main(["site", "approve", "../7", str(tmp_path)]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_that_is_shown_and_signed_is_the_one_that_flowers_command_makes():
    assert bundle.digest() == hashlib.sha256(build_fab_from_disk(ROOT)).hexdigest()


# --- between hub and sites
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def asking(federation, monkeypatch):
    """A federation whose site-2 asks its operator, a clock that only sleeping moves, and that operator."""
    monkeypatch.setattr(bundle, "digest", lambda: "ab" * 32)
    clock = FakeTime().of_the_hub(monkeypatch)
    federation.run_config["round-timeout"] = 1000
    federation.cached = federation.root / "cache" / "site-2"
    answers = federation.grid.answer

    def answer(order, context):
        if context.node_config["site-name"] == "site-2":
            monkeypatch.setenv("SITE_CONSENT", "ask")
        try:
            return answers(order, context)
        finally:
            monkeypatch.delenv("SITE_CONSENT", raising=False)

    federation.grid.answer, federation.clock = answer, clock
    return federation


def states(federation, monkeypatch) -> list[dict]:
    """What status.json says at every sleep."""
    seen, sleep = [], federation.clock.sleep

    def look(seconds: float) -> None:
        seen.append(json.loads((federation.adapters / "7" / "status.json").read_text()))
        sleep(seconds)

    monkeypatch.setattr(federation.clock, "sleep", look)
    return seen


def test_a_site_whose_operator_decides_late_is_waited_for_and_takes_part_in_the_same_round(asking, monkeypatch, capsys):
    seen, sleep = states(asking, monkeypatch), asking.clock.sleep

    def operator(seconds: float) -> None:
        sleep(seconds)
        if asking.clock.now > 100 and consent.find(asking.cached, "7").state == "waiting":
            consent.decide(asking.cached, consent.find(asking.cached, "7"), consent.APPROVED)

    monkeypatch.setattr(asking.clock, "sleep", operator)
    asking.go(monkeypatch)
    (entry,) = asking.history()["rounds"]
    assert sorted(entry["sites"]) == ["site-1", "site-2"] and entry["refused"] == [] and entry["undecided"] == []
    assert [s for s, number, _ in asking.grid.sent if number == "1"] == ["site-1"] + ["site-2"] * 5
    assert 100 < asking.clock.now < 140  # asked after 10, 20, 40 and 60 seconds
    assert seen[0]["undecided"] == ["site-2"] and seen[0]["missing"] == [] and seen[0]["refused"] == []
    out = capsys.readouterr().out
    assert out.count("bouquet: waits for consent  site-2: its operator has not decided yet") == 1
    assert "refused" not in out


def test_a_round_that_has_enough_sites_does_not_wait_for_an_operator_and_asks_again_in_the_next(asking, monkeypatch):
    asking.run_config |= {"min-sites": 1, "rounds": 2}
    asking.go(monkeypatch)
    rounds = asking.history()["rounds"]
    assert [(list(r["sites"]), r["undecided"], r["refused"]) for r in rounds] == [(["site-1"], ["site-2"], [])] * 2
    assert [number for site, number, _ in asking.grid.sent if site == "site-2"] == ["1", "2", "3"]
    assert asking.clock.now < 10


def test_nobody_decides_and_the_run_ends_with_the_reason_once_its_time_is_over(asking, monkeypatch):
    asking.run_config |= {"round-retries": 0, "round-timeout": 100}
    error = asking.fails(monkeypatch, "HUB-02")
    assert "site-2: TRUST-11  The site's operator has not decided on this run yet." in str(error)
    assert 100 <= asking.clock.now < 102


def test_a_site_that_declines_is_named_as_declining_and_not_as_failed(asking, monkeypatch, capsys):
    asking.run_config["min-sites"] = 1
    wants = consent.asked
    monkeypatch.setattr(
        consent, "asked", lambda *args: replace(wants(*args), state=consent.DECLINED, decided=1.0, by="anna@clinic")
    )
    asking.go(monkeypatch)
    (entry,) = asking.history()["rounds"]
    assert (entry["declined"], entry["refused"], list(entry["sites"])) == (["site-2"], [], ["site-1"])
    last = json.loads((asking.adapters / "7" / "status.json").read_text())
    assert last["declined"] == ["site-2"] and last["refused"] == []
    out = capsys.readouterr().out
    assert "bouquet: declined  site-2: its operator wants no part in this run" in out and "refused  site-2" not in out
    assert "anna" not in json.dumps(asking.history()) + json.dumps(last)


def test_where_a_site_that_is_needed_declines_nobody_trains_in_vain_again(asking, monkeypatch):
    asking.run_config["round-retries"] = 2
    wants = consent.asked
    monkeypatch.setattr(consent, "asked", lambda *args: replace(wants(*args), state=consent.DECLINED))
    error = asking.fails(monkeypatch, "HUB-02")
    assert "site-2: TRUST-12  The site's operator has declined this run." in str(error)
    assert len(asking.grid.sent) == 2


def test_a_site_without_a_word_in_its_settings_takes_part_as_before_and_asks_nothing(federation, monkeypatch):
    federation.go(monkeypatch)
    for site in ("site-1", "site-2"):
        assert not (federation.root / "cache" / site / consent.FOLDER).exists()
        found = audit.check((federation.root / "cache" / site / journal.FILE).read_bytes())
        assert found.faults == () and [entry.get("round") for entry in found.entries] == [None, 1, 2]


def test_a_message_that_a_site_refuses_is_a_line_of_its_journal(federation, monkeypatch):
    federation.own["site-2"]["limits"] = "max-local-steps=0"
    federation.run_config["min-sites"] = 1
    federation.go(monkeypatch)
    entries = audit.check((federation.root / "cache" / "site-2" / journal.FILE).read_bytes()).entries
    assert [(entry["did"], entry.get("code"), entry.get("run")) for entry in entries] == [
        ("began", None, None), ("refused", "TRUST-03", "7"), ("refused", "TRUST-03", "7"),
    ]  # fmt: skip
    assert journal.read(federation.root / "cache" / "site-2") == []


# --- which sites a run asks
# --------------------------------------------------------------------------------------------


def test_a_run_asks_the_sites_that_it_names_alone(tmp_path, monkeypatch):
    three = {"site-1": 8, "site-2": 12, "site-3": 8}
    federation = Federation(tmp_path, counts=three, rounds=1, local_steps=1, sample_prompts="", sites="site-3, site-1")
    federation.go(monkeypatch)
    assert {site for site, _, _ in federation.grid.sent} == {"site-1", "site-3"}
    assert sorted(federation.history()["rounds"][0]["sites"]) == ["site-1", "site-3"]


def test_a_site_that_the_hub_does_not_know_ends_the_run_before_anybody_is_asked(federation, monkeypatch):
    federation.run_config["sites"] = "site-1,site-2,sight-3"
    error = federation.fails(monkeypatch, "HUB-10")
    assert str(error) == "HUB-10  The hub does not know a site that the run names: sight-3."
    assert "the hub knows site-1, site-2" in error.report() and federation.grid.sent == []


def test_a_site_that_is_admitted_and_named_and_does_not_come_is_waited_for(federation, monkeypatch, tmp_path):
    for name in ("site-1.pub", "site-2.pub", "site-9.pub"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("BOUQUET_ADMITTED", str(tmp_path))
    FakeTime().of_the_hub(monkeypatch)
    federation.run_config["sites"] = "site-1,site-9"
    assert str(federation.fails(monkeypatch, "HUB-01")).endswith("Here: site-1. Missing: site-9.")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sites": "garden"}, "min-sites"),
        ({"sites": "garden,garden"}, "min-sites"),
        ({"sites": "garden,"}, "sites"),
        ({"sites": "garden;clinic"}, "sites"),
        ({"sites": "../garden,clinic"}, "sites"),
    ],
)
def test_names_that_are_none_and_fewer_than_a_round_needs_are_refused(values, key):
    with pytest.raises(ConfigError, match=f"CONFIG-02.*'{key}'"):
        RunConfig.read(values)


# --- what the hub's operator sees
# ---------------------------------------------------------------------------------------


def test_the_status_names_who_has_not_decided_and_who_has_declined():
    facts = {
        "run": "7", "state": "running", "doing": "waiting", "why": "", "rounds": {"done": 0, "wanted": 2}, "round": 1,
        "try": 1, "since": None, "deadline": None, "for": None, "replied": [], "missing": {}, "took": {}, "errors": {},
        "adapter": None, "undecided": ["clinic"], "declined": ["museum"],
    }  # fmt: skip
    told = status.words(facts, 0.0).splitlines()
    assert "undecided clinic  its operator has not approved the run yet; it is asked again" in told
    assert "declined  museum  its operator wants no part in the run" in told
