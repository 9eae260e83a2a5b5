"""What a site's photos give away: the accountant against closed forms and another library, the budget on disk, and
whole rounds of a hub and sites in one process.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from app import audit, metrics, wire
from app.adapter import store
from app.config import RunConfig
from app.errors import SiteError
from app.hub import history
from app.site import budget, client_app, consent, journal, train
from app.site.accountant import Steps, Terms, epsilon
from app.site.limits import Limits
from app.site.privacy import Privacy
from bouquet import ROOT, cli
from bouquet.adapter import card
from bouquet.report import findings, page, reading
from bouquet.site import cost, preflight
from bouquet.site.settings import Settings
from tests.kit import tiny
from tests.kit.memory import Federation
from tests.kit.wait import until
from tests.test_masks import federation as with_masks
from tests.test_privacy import photos as photos_of

DELTA = 1e-5
TERMS = Terms(photos=200, images=16, noise=1.0, clip=0.05)
RUN = RunConfig.read({"rounds": 2, "local-steps": 60, "batch-size": 16})  # epsilon 6.11 with these terms
EIGHT = budget.Promise(8.0)


def code(call, *args) -> str:
    """Of the error that is raised, or nothing."""
    try:
        call(*args)
    except SiteError as error:
        return error.code
    return ""


# --- the accountant
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("photos", "noise", "expected"), [
    (200, 1.0, 12.5), (200, 2.0, 4.2), (2000, 1.0, 1.0), (2000, 2.0, 0.33),
])  # fmt: skip
def test_480_steps_of_16_cost_what_the_page_says_and_ten_times_the_photos_a_tenth(photos, noise, expected):
    assert epsilon([Steps(16 / photos, noise, 480)], DELTA) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("noise", "expected"), [(1.0, 6.7), (2.0, 2.2)])
def test_the_run_of_which_the_page_says_what_it_learned_cost_what_the_page_says(noise, expected):
    assert epsilon([Steps(16 / 183, noise, 120)], DELTA) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("done", "theirs"), [
    ([(0.08, 1.0, 120)], 6.1095), ([(0.08, 2.0, 120)], 2.0096), ([(16 / 180, 1.0, 120)], 6.8110),
    ([(0.08, 1.0, 480)], 12.5016), ([(0.08, 2.0, 480)], 4.2051), ([(0.008, 1.0, 480)], 1.0277),
    ([(0.008, 2.0, 480)], 0.3315), ([(16 / 100_000, 0.6, 5000)], 0.376516), ([(1.0, 4.0, 100)], 13.206712),
    ([(0.08, 1.0, 120), (0.04, 2.0, 300), (0.008, 0.7, 60)], 6.398434),
])  # fmt: skip
def test_epsilon_is_dp_accountings_and_never_less(done, theirs):
    """Its version 0.6.0, PLDAccountant (of the eighth with a grid of 1e-5), delta 1e-5; printed once by hand."""
    assert 0.9999 * theirs < epsilon([Steps(*one) for one in done], DELTA) < 1.003 * theirs


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (4.0, 100), (0.5, 3), (30.0, 2000)])
def test_without_sampling_epsilon_is_the_gaussian_mechanisms_closed_form(noise, count):
    """Balle and Wang 2018, arXiv:1805.06530, theorem 8, of `count` Gaussians, which are one of noise / √count."""
    mu, got = math.sqrt(count) / noise, epsilon([Steps(1.0, noise, count)], DELTA)

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    exact = phi(mu / 2 - got / mu) - math.exp(got) * phi(-mu / 2 - got / mu)
    assert exact <= DELTA * (1 + 1e-6) and exact == pytest.approx(DELTA, rel=0.02)


@pytest.mark.parametrize(("rate", "noise", "count"), [(0.08, 1.0, 120), (0.01, 0.8, 1000), (0.5, 3.0, 50)])
def test_epsilon_is_below_the_bound_that_renyis_divergences_give(rate, noise, count):
    """Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3, whole orders; turned into epsilon by Canonne, Kamath,
    Steinke 2020, arXiv:2004.00010, proposition 12.
    """

    def bound(order: int) -> float:
        parts = (
            math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp(k * (k - 1) / (2 * noise**2))
            for k in range(order + 1)
        )
        renyi = count * math.log(sum(parts)) / (order - 1)
        return renyi + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)

    least = min(map(bound, range(2, 24)))
    assert 0.6 * least < epsilon([Steps(rate, noise, count)], DELTA) < least


def test_nothing_costs_nothing_no_noise_costs_all_and_the_order_does_not_matter():
    some = [Steps(0.08, 1.0, 60), Steps(0.01, 2.0, 30), Steps(0.08, 1.0, 60)]
    assert epsilon([], DELTA) == epsilon([Steps(0.5, 1.0, 0)], DELTA) == 0.0
    assert epsilon([*some, Steps(0.1, 0.0, 1)], DELTA) == math.inf
    assert epsilon(some, DELTA) == pytest.approx(epsilon(some[::-1], DELTA), rel=1e-9)
    assert epsilon(some[:1], DELTA) < epsilon(some[:2], DELTA) < epsilon(some, DELTA)
    assert epsilon(some, DELTA) < epsilon(some, DELTA / 10)


@pytest.mark.parametrize(
    "one", [Steps(1.0, 0.05, 10), Steps(1e-6, 1.0, 1), Steps(0.9, 200.0, 100_000), Steps(1e-8, 0.35, 1000)]
)
def test_odd_settings_give_a_number(one):
    assert 0 <= epsilon([one], DELTA) < math.inf


# --- what a site promises
# ---------------------------------------------------------------------------------------------------------


def test_a_site_writes_its_promise_in_words():
    read = budget.Promise.read
    assert read("") is None and read("  ") is None and read("off") is None
    assert read("epsilon=8") == EIGHT
    words = "epsilon=2.5 delta=1e-6 clip=0.2 noise=1.5 photos=150"
    assert read(words) == budget.Promise(2.5, 1e-6, 0.2, 1.5, 150)


@pytest.mark.parametrize("text", [
    "epsilon", "epsilon=", "epsilon=x", "epsilon=0", "epsilon=-1", "epsilon=inf", "epsilon=nan", "delta=1e-5",
    "epsilon=8 delta=1", "epsilon=8 delta=0", "epsilon=8 epsilon=80", "epsilon=8 clip=0", "epsilon=8 noise=0",
    "epsilon=8 photos=1.5", "epsilon=8 sigma=1", "epsilon=8,delta=1e-5", "on", "off epsilon=8",
])  # fmt: skip
def test_a_slip_in_the_promise_stops_every_run_rather_than_promising_nothing(text):
    with pytest.raises(SiteError, match="TRUST-16"):
        budget.Promise.read(text)


def test_a_promise_that_is_taken_away_has_to_be_taken_away_in_words(tmp_path):
    assert budget.of({}, tmp_path) is None
    budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", 1)
    assert code(budget.of, {}, tmp_path) == code(budget.of, {"SITE_PRIVACY": " "}, tmp_path) == "TRUST-16"
    assert budget.of({"SITE_PRIVACY": "off"}, tmp_path) is None
    assert budget.of({"SITE_PRIVACY": "epsilon=8"}, tmp_path) == EIGHT


def test_a_promise_is_not_forgotten_where_the_journal_alone_knows_of_its_payments(tmp_path):
    journal.deed(tmp_path, "approved", run="7")
    assert budget.of({}, tmp_path) is None
    budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", 1)
    (tmp_path / budget.FILE).unlink()
    with pytest.raises(SiteError, match="TRUST-16") as caught:
        budget.of({}, tmp_path)
    assert str(tmp_path / journal.FILE) in caught.value.found
    assert budget.of({"SITE_PRIVACY": "off"}, tmp_path) is None


def test_a_run_may_ask_for_more_noise_and_never_for_less():
    def terms(noise: float) -> Terms:
        return EIGHT.terms(replace(RUN, dp_noise=noise), 200)

    assert [terms(noise).noise for noise in (0.0, 0.5, 1.0, 3.0)] == [1.0, 1.0, 1.0, 3.0]
    assert terms(0.0) == Terms(200, 16, 1.0, 0.05) and terms(0.0).rate == 0.08
    more = replace(RUN, batch_size=8, gradient_accumulation=4)
    assert EIGHT.terms(more, 200).rate == 0.16  # passes of one step are one larger batch
    assert EIGHT.terms(more, 20) == Terms(20, 32, 1.0, 0.05) and EIGHT.terms(more, 20).rate == 1.0
    assert replace(EIGHT, photos=150).terms(RUN, 200) == Terms(150, 16, 1.0, 0.05)


def test_what_cannot_be_promised_is_refused_by_name():
    assert code(EIGHT.terms, replace(RUN, prior_loss_weight=1.0), 200) == "TRUST-18"
    assert code(EIGHT.terms, replace(RUN, resolutions="32,64"), 200) == "TRUST-18"
    assert code(budget.check, replace(RUN, dp_noise=1.0), None) == "TRUST-18"
    assert code(budget.check, RUN, None) == code(budget.check, replace(RUN, dp_noise=1.0), EIGHT) == ""
    assert code(EIGHT.terms, RUN, 100_000) == "TRUST-16"  # with a chance of 1e-5 one whole photo


def test_one_photo_more_in_the_folder_is_one_photo_more_on_one_side_and_nothing_else():
    secret = Privacy(bytes(range(32)))

    def split(number: int, **how) -> tuple[frozenset[str], frozenset[str]]:
        train, held = secret.split(photos_of(number), 0.1, 1, 8, **how)
        return frozenset(p.key for p in train), frozenset(p.key for p in held)

    sizes = []
    for number in range(20, 120):
        before, after = split(number, each=True), split(number + 1, each=True)
        assert before[0] <= after[0] and len(after[0] - before[0]) <= 1
        sizes.append(len(after[1]))
    assert 5 <= sizes[-1] <= 20
    moved = [split(number)[0] ^ split(number + 1)[0] for number in range(20, 120)]
    assert max(map(len, moved)) > 8  # held out in groups, one photo more moves a group


# --- the budget on the disk
# ---------------------------------------------------------------------------------------------------------------


def lines(folder: Path, file: str = budget.FILE) -> list[dict]:
    return [entry for entry in audit.check((folder / file).read_bytes()).entries if entry.get("did") == budget.SPENT]


def test_a_round_is_paid_on_disk_for_the_site_alone_and_in_its_journal(tmp_path):
    paid = budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", 1)
    assert paid == pytest.approx(epsilon([Steps(0.08, 1.0, 60)], DELTA))
    assert stat.S_IMODE((tmp_path / budget.FILE).stat().st_mode) == 0o600
    (held,), (told,) = lines(tmp_path), lines(tmp_path, journal.FILE)
    facts = {"run": "7", "round": 1, "steps": 60, "rate": 0.08, "noise": 1.0, "photos": 200, "delta": DELTA}
    assert held.items() >= facts.items() and told.items() >= facts.items()
    assert held["epsilon"] == pytest.approx(paid, abs=1e-6) and journal.read(tmp_path) == []


def test_what_is_spent_adds_up_over_rounds_runs_and_restarts(tmp_path):
    promise = budget.Promise(9.0)
    for run, number in (("7", 1), ("7", 2), ("8", 2)):
        paid = budget.spend(tmp_path, promise, TERMS, RUN, run, number)
    assert paid == pytest.approx(epsilon([Steps(0.08, 1.0, 180)], DELTA)) == budget.epsilon(tmp_path, DELTA)
    budget.spend(tmp_path, promise, TERMS._replace(noise=3.0), RUN, "9", 2)  # another kind of steps, with what was
    assert budget.epsilon(tmp_path, DELTA) == pytest.approx(
        epsilon([Steps(0.08, 1.0, 180), Steps(0.08, 3.0, 60)], DELTA)
    )


def test_a_run_that_the_budget_has_no_room_for_is_refused_before_its_first_round_and_pays_nothing(tmp_path):
    assert code(budget.spend, tmp_path, budget.Promise(6.0), TERMS, RUN, "7", 1) == "TRUST-15"  # 6.11 for both rounds
    assert not (tmp_path / budget.FILE).exists()
    assert code(budget.spend, tmp_path, budget.Promise(6.0), TERMS, RUN, "7", 2) == ""  # its last one alone
    assert code(budget.spend, tmp_path, budget.Promise(6.0), TERMS, RUN, "8", 2) == "TRUST-15"


def test_a_round_that_is_asked_for_again_is_paid_again_until_nothing_is_left(tmp_path):
    codes = [code(budget.spend, tmp_path, EIGHT, TERMS, RUN, "7", 1) for _ in range(4)]
    assert codes == ["", "", "", "TRUST-15"]  # 180 steps cost 7.5, 240 cost 8.7
    with pytest.raises(SiteError) as caught:
        budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", 2)
    assert "of 8 is spent" in caught.value.found and len(lines(tmp_path)) == 3


def test_several_processes_at_once_spend_no_more_than_there_is(tmp_path):
    def pay(number: int) -> str:
        return code(budget.spend, tmp_path, EIGHT, TERMS, replace(RUN, rounds=1), str(number), 1)

    with ThreadPoolExecutor(6) as pool:  # a lock is of an open file, so that threads exclude each other alike
        codes = sorted(pool.map(pay, range(6)))
    assert codes == [""] * 3 + ["TRUST-15"] * 3 and len(lines(tmp_path)) == 3


def cut(content: bytes) -> bytes:
    return content[: content.rindex(b"\n", 0, -1) + 1]


@pytest.mark.parametrize("spoil", [
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(cut(file.read_bytes())),
    lambda file: file.write_bytes(file.read_bytes()[:-20]),
    lambda file: file.write_bytes(file.read_bytes().replace(b'"steps": 60', b'"steps": 06', 1)),
    lambda file: file.write_bytes(file.read_bytes().replace(b'"noise": 1.0', b'"noise": 9.0', 1)),
    lambda file: file.write_bytes(file.read_bytes() + b'{"did": "spe'),
], ids=["gone", "empty", "a line less", "torn", "no number", "changed", "a piece more"])  # fmt: skip
def test_where_the_record_of_what_was_spent_is_not_whole_nothing_is_trained(spoil, tmp_path):
    for number in (1, 2):
        budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", number)
    spoil(tmp_path / budget.FILE)
    assert code(budget.spend, tmp_path, budget.Promise(1000.0), TERMS, RUN, "8", 1) == "TRUST-17"
    assert code(budget.epsilon, tmp_path, DELTA) == "TRUST-17"


def test_a_site_that_was_killed_before_its_first_line_has_spent_nothing(tmp_path):
    (tmp_path / budget.FILE).touch(0o600)
    assert budget.epsilon(tmp_path, DELTA) == 0.0
    assert budget.spend(tmp_path, EIGHT, TERMS, RUN, "7", 1) > 0


KILLED = """
import sys
from pathlib import Path
import pytest
from tests import test_budget
test_budget.tiny.be_the_hub(pytest.MonkeyPatch())
test_budget.message_to(Path(sys.argv[1]), rounds=1, local_steps=1_000_000)
"""


def message_to(root: Path, kind: str = "train", number: int = 1, run: int = 7, **changes) -> Message:
    """A site's answer to a hub's message, by the real ClientApp in this process."""
    paths = {"data-path": root / "data", "models-path": tiny.models(), "cache-path": root / "cache"}
    own = {"site-name": "rose"} | {key: str(path) for key, path in paths.items()}
    asked = tiny.RUN | {key.replace("_", "-"): value for key, value in changes.items()}
    content = RecordDict({"config": ConfigRecord({"round": number, "base-fingerprint": ""})})
    content["arrays"] = wire.pack(tiny.fresh())
    message = Message(content, dst_node_id=1, message_type=kind)
    return client_app.app(message, Context(run, 1, own, RecordDict(), asked))


@pytest.mark.slow
def test_a_site_that_is_killed_in_a_round_has_paid_for_all_of_it(tmp_path, monkeypatch):
    """A real process, killed by the kernel while it trains; another one knows what it spent, and does not train on."""
    tiny.site(tmp_path / "data", 40)
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=0.6 noise=1000")
    file = tmp_path / "cache" / budget.FILE
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        until(lambda: file.exists() and lines(tmp_path / "cache"), over=lambda: child.poll() is not None)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    (paid,) = lines(tmp_path / "cache")
    assert paid["steps"] == 1_000_000 and paid["run"] == "7" and journal.read(tmp_path / "cache") == []
    assert paid["epsilon"] > 0.4 and budget.epsilon(tmp_path / "cache", DELTA) == pytest.approx(
        paid["epsilon"], abs=1e-5
    )
    tiny.be_the_hub(monkeypatch)
    again = message_to(tmp_path, rounds=1, local_steps=1_000_000)
    assert again.has_error() and again.error.reason.startswith("TRUST-15")
    assert len(lines(tmp_path / "cache")) == 1


# --- whole rounds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_run_with_the_promise_tells_an_adapter_the_photos_epsilon_and_no_other_number(tmp_path, monkeypatch):
    federation = Federation(tmp_path, sample_prompts="")
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=400 clip=0.1 noise=0.7")
    folder = federation.go(monkeypatch)
    names = {"num-examples", "dp-epsilon", "dp-delta", "dp-noise"}
    assert [set(reply.content["metrics"]) for _, _, reply in federation.grid.came] == [names] * 6
    told, run = federation.history(), reading.read(folder)
    assert told["state"] == "finished" and told["validation"] == []
    assert not any("train_loss" in entry for entry in told["rounds"])
    for site, count in (("site-1", 8), ("site-2", 12)):
        here = [entry["sites"][site] for entry in told["rounds"]]
        trained = here[0]["num-examples"]
        rate = 4 / trained
        assert trained < count
        assert [one["dp-epsilon"] for one in here] == [
            pytest.approx(epsilon([Steps(rate, 0.7, 3 * number)], DELTA)) for number in (1, 2)
        ]
    last = [reply for _, number, reply in federation.grid.came if number == "3"]
    assert [reply.content["metrics"]["dp-epsilon"] for reply in last] == [  # the last measure costs nothing
        told["rounds"][-1]["sites"][site]["dp-epsilon"] for site in ("site-1", "site-2")
    ]
    worst = max(part["dp-epsilon"] for part in told["rounds"][-1]["sites"].values())
    spent = history.read_provenance(folder / "final" / "provenance.json").privacy
    assert spent == history.Spent(2, 2, worst, DELTA)
    row = f"2 of 2 sites, by their own account: epsilon {worst:.3g} of each photo at delta 1e-05"
    assert row in card.privacy(spent)
    assert (
        findings.outcome(run)
        == "The run finished 2 of 2 rounds. Its sites have differential privacy, and tell no losses."
    )
    assert f">{worst:,.2f}<" in page.page(run)


def test_a_site_without_the_promise_is_measured_beside_one_that_has_it(tmp_path, monkeypatch, capsys):
    federation = Federation(tmp_path, sample_prompts="")
    answers = federation.grid.answer

    def answer(order, context):
        with monkeypatch.context() as patch:
            if context.node_config["site-name"] == "site-2":
                patch.setenv("SITE_PRIVACY", "epsilon=400")
            return answers(order, context)

    federation.grid.answer = answer
    federation.go(monkeypatch)
    told = federation.history()
    assert [list(entry["sites"]) for entry in told["validation"]] == [["site-1"]] * 3
    assert all(entry["weighted"] == entry["sites"]["site-1"] for entry in told["validation"])
    assert told["rounds"][0]["train_loss"] == told["rounds"][0]["sites"]["site-1"]["train-loss"]
    assert [entry["after_round"] for entry in told["validation"]] == [0, 1, 2]


def test_a_reply_without_losses_counts_only_with_an_epsilon_and_a_delta():
    def lacks(**numbers: float) -> list[str]:
        told = {"num-examples": 8} | {key.replace("_", "-"): value for key, value in numbers.items()}
        return [name for name in metrics.needed(told) if name not in told]

    assert lacks() == ["train-loss", "validation-loss"] and lacks(train_loss=0.1) == ["validation-loss"]
    assert lacks(dp_epsilon=1.0) == ["dp-delta"] and lacks(dp_epsilon=1.0, dp_delta=1e-5) == []
    assert metrics.sane({"dp-epsilon": float("inf"), "dp-delta": 2.0, "dp-noise": -1.0}) == ({}, 3)


def test_with_masks_each_site_pays_too_and_weighs_what_it_told(tmp_path, monkeypatch):
    federation = with_masks(tmp_path, rounds=1)
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=4000 photos=50")
    folder = federation.go(monkeypatch)
    (entry,) = federation.history()["rounds"]
    one_round = pytest.approx(epsilon([Steps(4 / 50, 1.0, 3)], DELTA))
    said = [(part["num-examples"], part["weight"], part["dp-epsilon"]) for part in entry["sites"].values()]
    assert said == [(50, 50, one_round)] * 3
    assert [len(lines(tmp_path / "cache" / name)) for name in entry["sites"]] == [1, 1, 1]
    moved = store.read_adapter(folder / "final")
    assert all(value.isfinite().all() for value in moved.values()) and not tiny.equal(moved, tiny.fresh())


@pytest.mark.slow
def test_a_spent_budget_ends_a_sites_part_whatever_the_run_says(tmp_path, monkeypatch):
    tiny.site(tmp_path / "data", 40)
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=7 noise=1")
    tiny.be_the_hub(monkeypatch)
    asks = {"rounds": 1, "local_steps": 4, "batch_size": 8}
    codes = []
    for run in range(7, 13):
        reply = message_to(tmp_path, run=run, dp_noise=0.1, **asks)
        codes.append(reply.error.reason[:8] if reply.has_error() else "")
    allowed = codes.index("TRUST-15")
    assert allowed > 0 and set(codes[:allowed]) == {""} and set(codes[allowed:]) == {"TRUST-15"}
    assert budget.epsilon(tmp_path / "cache", DELTA) <= 7
    assert not message_to(tmp_path, "evaluate", number=2).has_error()  # tells nothing, and costs nothing
    told = audit.check((tmp_path / "cache" / journal.FILE).read_bytes()).entries
    assert [entry["code"] for entry in told if entry.get("did") == "refused"] == ["TRUST-15"] * (6 - allowed)


def test_out_of_memory_is_not_tried_again_and_no_draw_is_repeated(tmp_path, monkeypatch):
    import torch

    tries = []

    def full(*_) -> float:
        tries.append(1)
        raise torch.OutOfMemoryError

    here = train.Site(
        tiny.CONFIG, tiny.models(), tiny.site(tmp_path / "data", 12), tmp_path / "cache", "", promise=EIGHT
    )
    monkeypatch.setattr(train.dp, "fit", full)
    with pytest.raises(SiteError, match="SITE-13"):
        here.fit_privately(here.terms)
    assert tries == [1]


def test_private_photos_are_told_rounded_or_as_the_site_says(tmp_path):
    def told(promise: budget.Promise) -> tuple[int, int]:
        how = {"limits": Limits(), "secret": train.privacy.Secret.MADE, "promise": promise}
        here = train.Site(tiny.config(local_steps=4), tiny.models(), folder, tmp_path / "cache", "", **how)
        return here.told, len(here.train.keys)

    folder = tiny.site(tmp_path / "data", 130, public=False)
    number, trained = told(EIGHT)
    assert 60 < trained < 130 and number == (trained if trained < 100 else trained // 10 * 10)
    assert told(replace(EIGHT, photos=50)) == (50, trained)


# --- for a person
# -----------------------------------------------------------------------------------------------------------------


def test_the_operator_is_told_what_a_planned_run_would_cost_and_whether_it_makes_sense(tmp_path):
    folder, cached = tiny.site(tmp_path / "data", 60), tmp_path / "cache"
    config = tiny.config(rounds=4, local_steps=10, batch_size=8)

    def told(promise: budget.Promise | None, config: RunConfig = config) -> list[str]:
        return cost.told(promise, config, folder, cached, Limits(), tiny.models())

    assert told(None)[0].startswith("SITE_PRIVACY is not set")
    said = told(budget.Promise(20.0))
    trained = int(said[0].split()[1])
    needed = epsilon([Steps(8 / trained, 1.0, 40)], DELTA)
    assert said[2] == "spent     epsilon 0.00, in 0 rounds of 0 runs"
    assert said[3].endswith(f"4 rounds of 10 steps of 8 photos, noise 1, clip 0.05: epsilon {needed:.2f} by its end")
    assert said[4] == f"fits      {20 - needed:.2f} would be left"
    numbers = sum(value.numel() for value in tiny.fresh(config).values())
    assert said[5].startswith(f"sense     a step's noise is {math.sqrt(numbers) / 8:.0f} times")
    fits = next(n for n in range(5) if epsilon([Steps(8 / trained, 1.0, 10 * (n + 1))], DELTA) > 5)
    assert told(budget.Promise(5.0))[4] == f"too much  it is refused (TRUST-15); {fits} such rounds fit"
    budget.spend(cached, budget.Promise(20.0), Terms(trained, 8, 1.0, 0.05), config, "7", 1)
    assert told(budget.Promise(20.0))[2].endswith("in 1 rounds of 1 runs")


def test_a_person_asks_by_one_command_and_the_check_before_joining_fails_where_a_run_does_not_fit(
    tmp_path, monkeypatch, capsys
):
    tiny.site(tmp_path / "data", 40)
    places = {"BOUQUET_DATA": "data", "BOUQUET_CACHE": "cache"}
    for key, folder in places.items():
        monkeypatch.setenv(key, str(tmp_path / folder))
    monkeypatch.setenv("BOUQUET_MODELS", str(tiny.models()))
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=9 photos=40")
    planned = 'base-model="tiny" resolution=16 rounds=1 local-steps=4 batch-size=8'
    assert cli.main(["site", "privacy", "--run-config", planned]) == 0
    needed = epsilon([Steps(0.2, 1.0, 4)], DELTA)
    assert f"epsilon {needed:.2f} by its end" in capsys.readouterr().out

    def decode(config: str) -> preflight.Line:
        return preflight.Preflight(Settings.read(os.environ, config)).line("decode")

    fits = decode(planned)
    assert fits.state == "pass" and "each of them promised epsilon 9" in fits.text
    refused = decode(planned.replace("rounds=1", "rounds=100"))
    assert refused.state == "fail" and refused.text.startswith("TRUST-15")
    monkeypatch.setenv("SITE_PRIVACY", "epsilon=9 noise")
    assert cli.main(["site", "privacy"]) == 1 and "TRUST-16" in capsys.readouterr().err


def test_rounds_that_left_without_noise_are_counted_beside_what_is_spent(tmp_path):
    """Two before the promise; of the one under it, asked for twice, one answer; one while it was off; none measured."""
    folder, cached = tiny.site(tmp_path / "data", 60), tmp_path / "cache"
    config = tiny.config(rounds=1, local_steps=10, batch_size=8)

    def said() -> list[str]:
        return [line for line in cost.told(budget.Promise(20.0), config, folder, cached, Limits(), tiny.models())
                if line.startswith("before")]  # fmt: skip

    assert said() == []
    cached.mkdir(exist_ok=True)
    for number in (1, 2):
        journal.note(cached, run="6", round=number, images=54, applied="a", sent="b")
    assert "beside that 2 rounds left without noise" in budget.outlook(cached, EIGHT, RUN)
    for _ in range(2):
        budget.spend(cached, budget.Promise(20.0), TERMS, RUN, "7", 1)
    journal.note(cached, run="7", round=1, images=54, applied="a", sent="b")
    assert budget.without_noise(cached) == 2
    journal.note(cached, run="8", round=1, images=54, applied="a", sent="b")
    journal.note(cached, run="8", round=2, images=54, applied="a", sent="")  # measured alone
    assert said() == [
        "before    3 rounds left without noise, before this promise or while it was off: neither the promise nor what"
        " is spent is about them"
    ]
    assert budget.outlook(cached, EIGHT, RUN).endswith(" by the run's end; beside that 3 rounds left without noise")


def test_who_decides_on_a_run_reads_what_it_would_cost(tmp_path):
    assert "at most epsilon 8 of each photo" in budget.outlook(tmp_path, EIGHT, RUN)
    budget.spend(tmp_path, EIGHT, TERMS._replace(noise=4.0), RUN, "6", 1)
    now, then = budget.epsilon(tmp_path, DELTA), budget.epsilon(tmp_path, DELTA, Steps(0.08, 1.0, 120))
    said = budget.outlook(tmp_path, EIGHT, RUN)
    assert said == f"epsilon {now:.2f} of 8 is spent of each photo (delta 1e-05), and {then:.2f} by the run's end"
    asked = consent.asked(tmp_path, "7", RUN, "ab" * 32, "cd" * 32, "", said)
    with contextlib.suppress(SiteError):
        consent.obtain(tmp_path, "ask", asked)
    words = consent.words(consent.find(tmp_path, "7"))
    assert f"  privacy     {said}" in words and not any("losses" in line for line in words)
