"""A few faults of the full set (scripts/faults) on a real deployment, and whether the harness says so when something
is lost.

One deployment of three sites serves the first half: its output volume is a small mount where that is allowed, and
site-3 may lie.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import sh
from safetensors.torch import load_file, save_file

from app import model
from app.adapter import store
from benchmarks import check
from benchmarks.faults import __main__ as faults
from benchmarks.faults import containers, disk, network, outcome, photos, updates
from benchmarks.faults.bench import HOSTILE, RUN, Bench
from benchmarks.faults.case import Case, differs, judge, lost, play, recovered
from benchmarks.faults.hub import Late
from benchmarks.faults.outcome import Outcome
from bouquet import ROOT
from tests.kit import tiny
from tests.kit.wait import until


@contextlib.contextmanager
def everything(home: Path) -> Iterator[Bench]:
    """A small output volume and a hostile site, in one deployment; what is learned does not matter."""
    volume = contextlib.nullcontext() if disk.no_mount() else disk.small(home / "adapters", disk.SIZES["adapters"])
    site_3 = {"PYTHONPATH": f"{HOSTILE}:{ROOT}", "BOUQUET_WRONG": str(home / "wrong.json")}
    with volume, Bench(home, site_3=site_3) as bench:
        bench.config = {"local-steps": 2}
        yield bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with everything(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.fixture
def slowly(bench: Bench) -> Iterator[None]:
    """The hostile site only takes its time in the rounds that are disturbed: what comes in the middle of one does."""
    file = bench.home / "wrong.json"
    file.write_text(json.dumps({2: "slowly", 3: "slowly"}))
    yield
    file.unlink()


@pytest.fixture(scope="module")
def two_runs(bench: Bench) -> list[str]:
    """Two runs that nothing happens to, started at once; they have ended well."""
    bench.all_online()
    runs = [bench.start_run(RUN), bench.start_run(RUN)]
    assert [bench.wait_for_end(run) for run in runs] == ["finished:completed"] * 2
    return runs


@pytest.fixture(scope="module")
def reference(bench: Bench, two_runs: list[str]) -> str:
    """What the first of them learned; a disturbed run, which has the sites to itself, has to learn the same."""
    return model.adapter_hash(store.read_adapter(bench.adapters / two_runs[0] / "final"))


def finished(bench: Bench) -> str:
    return os.readlink(bench.adapters / "latest")


# --- faults on a real deployment
# --------------------------------------------------------------------------------------------------


def test_two_runs_at_once_keep_apart_and_each_gives_the_undisturbed_adapter(
    bench: Bench, reference: str, two_runs: list[str]
) -> None:
    last = finished(bench)
    assert last in two_runs
    # of the one that was done first the checker says nothing but that `latest` has gone on to the other
    for run in two_runs:
        assert check.check(bench.evidence(run)) == (
            [] if run == last else [f"latest is {last}, the run's state is 'finished'"]
        )
        assert differs(bench, run, reference, same=True) == []


def test_a_hub_that_is_killed_while_a_site_restarts_and_a_client_app_that_ends_end_the_run_as_if_nothing_had_been(
    bench: Bench, reference: str, slowly: None
) -> None:
    """Hub and site in round 2. In round 3 a ClientApp ends without a reply: Flower's SuperNode waits for it for ever,
    and the site takes part in nothing any more; it is answered for, and the round is tried again.
    """

    def fault(bench: Bench, run: str) -> None:
        bench.signal("site-3", signal.SIGTERM)
        bench.signal("superlink", signal.SIGKILL)
        bench.mid_round(run, 3)
        os.kill(bench.child("site-3", "flwr-clientapp"), signal.SIGTERM)

    result = play(Case("kill", "all three", fault), bench, reference)
    assert result.survived and result.how == "" and result.recovery, result
    rounds = bench.evidence(finished(bench)).history()["rounds"]
    assert [[each["site"] for each in entry["refused"]] for entry in rounds][2] == ["site-3"]


def test_bad_updates_are_refused_by_name_and_the_round_is_the_honest_sites_mean(bench: Bench) -> None:
    names = [
        "NaN",
        "a wrong key",
        "weight 1e300",
        "a chunk list that repeats one chunk to 40 GB",
        "a replayed reply",
        "no GPU memory at first",
    ]
    results = updates.one_run(bench, bench.home / "wrong.json", names)
    (bench.home / "wrong.json").unlink()
    assert [(result.case, result.problems) for result in results] == [(name, []) for name in names]


@pytest.mark.skipif(bool(disk.no_mount()), reason=disk.no_mount())
def test_on_a_full_output_volume_the_run_ends_declared_and_a_second_one_gives_the_undisturbed_adapter(
    bench: Bench, reference: str, slowly: None
) -> None:
    result = play(Case("disk", "full", disk.output_full), bench, reference)
    assert (result.survived, result.how, result.lost) == (True, "resumed", 0), result


def test_the_harness_says_lost_when_an_earlier_adapter_has_changed_or_gone(bench: Bench, reference: str) -> None:
    run, before = finished(bench), check.adapters(bench.adapters)
    kept = bench.home / "kept"
    for harm in (shutil.rmtree, lambda folder: _add_one(folder / "adapter_model.safetensors")):
        folder = bench.adapters / run / "round-0001"
        shutil.copytree(folder, kept)
        harm(folder)
        problems = judge(bench, run, "finished:completed", before, 1, 2)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(kept, folder)
        assert lost(problems) == 1, problems
    assert judge(bench, run, "finished:completed", before, 1, 2) == []


def test_the_harness_says_so_when_a_run_is_late_or_its_end_is_not_declared(bench: Bench, reference: str) -> None:
    run, before = finished(bench), check.adapters(bench.adapters)
    assert any("3 s, 2 s were allowed" in problem for problem in judge(bench, run, "finished:completed", before, 3, 2))
    assert any("Flower says 'running'" in problem for problem in judge(bench, run, "running", before, 1, 2))
    assert judge(bench, "7", "finished:failed", before, 1, 2) == ["the run ended finished:failed and left no history"]
    with pytest.raises(Late, match="run 7's end: not within 0 s"):
        bench.wait_for_end("7", 0)


def test_the_harness_says_so_when_the_result_is_another_one(bench: Bench, reference: str) -> None:
    run = finished(bench)
    assert differs(bench, run, reference, same=True) == []
    assert differs(bench, run, "0" * 64, same=True) == ["the adapter is not that of an undisturbed run"]
    assert differs(bench, run, "0" * 64, same=False) == []


def test_recovery_counts_from_the_fault_to_the_next_whole_round(bench: Bench, reference: str) -> None:
    run = finished(bench)
    folder = bench.adapters / run / "round-0002"
    assert recovered(bench, run, done=1, fault=folder.stat().st_mtime - 4) == 4.0
    assert recovered(bench, run, done=9, fault=0) is None


def test_the_state_database_forgets_every_message_of_runs_that_have_ended(bench: Bench, two_runs: list[str]) -> None:
    """Runs that ended well and one that failed lie behind; a message would be a megabyte, what stays of a run is its
    name and its log, and of all of them the one bundle.
    """
    until(lambda: not kept(bench), every=1)
    assert in_use(bench) < 1024 * 1024


def test_three_sites_hide_their_updates_from_the_hub_and_begin_again_without_one_that_is_killed(
    bench: Bench, slowly: None
) -> None:
    """Through a real SuperLink, with the sites' own admitted keys; the checker finds the sum in what they sent."""
    bench.all_online()
    run = bench.start_run(RUN | {"secrecy": "masks", "norm-bound": 0.0, "round-timeout": 60})
    bench.mid_round(run, 2)
    os.kill(bench.child("site-3", "flwr-clientapp"), signal.SIGTERM)
    assert bench.wait_for_end(run) == "finished:completed", bench.said(run)
    assert check.check(bench.evidence(run)) == []
    rounds = check.Evidence(bench.adapters / run, bench.caches, ROOT / "models").history()["rounds"]
    assert [sorted(entry["sites"]) for entry in rounds] == [sorted(bench.sites)] * 3
    for site, cache in bench.caches.items():
        for entry in rounds:
            assert list(load_file(cache / "sent" / f"{entry['adapters'][site]}.safetensors")) == ["masked"]


def kept(bench: Bench) -> int:
    """Messages and their parts in the SuperLink's database."""
    with contextlib.closing(sqlite3.connect(bench.home / "state" / "superlink.db", timeout=30)) as database:
        return sum(
            database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("message_ins", "message_res", "objects")
        )


def in_use(bench: Bench) -> int:
    """Bytes of the SuperLink's database, but for bundles, that are not free for what comes next."""
    with contextlib.closing(sqlite3.connect(bench.home / "state" / "superlink.db", timeout=30)) as database:
        pages, free, size = (
            database.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "freelist_count", "page_size")
        )
        [(bundles,)] = database.execute("SELECT sum(length(content)) FROM fab")
        return (pages - free) * size - bundles


def _add_one(file: Path) -> None:
    adapter = load_file(file)
    adapter[min(adapter)] += 1
    save_file(adapter, file)


@pytest.mark.slow
def test_in_containers_docker_starts_a_killed_superlink_again_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, docker: None
) -> None:
    if why := containers.no_docker():
        pytest.skip(why)
    [case] = [case for case in containers.CASES if case.name == "SIGKILL of the SuperLink's container"]
    with containers.Containers(tmp_path) as hub:
        hub.config = {"local-steps": 2, "round-timeout": 400}
        result = play(case, hub, faults.undisturbed(hub))
    assert result.survived and result.how == "", result


# --- cases without a deployment
# ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(disk.no_mount()), reason=disk.no_mount())
def test_a_small_volume_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """Else it is in the way of whoever removes the folder: pytest ended with an error at each later run."""
    killed = (
        "import os, pathlib, sys; from benchmarks.faults import disk\n"
        "with disk.small(pathlib.Path(sys.argv[1]), '1m'): print(os.path.ismount(sys.argv[1])); sys.stdout.flush();"
        " os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", killed, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n" and done.returncode == -9, done.stderr
    until(lambda: not os.path.ismount(tmp_path), lambda: "still mounted")


def test_an_adapter_whose_writing_is_killed_in_every_tenth_is_never_half_written() -> None:
    [result] = disk.adapter_write(None, 1)
    assert result.survived, result


@pytest.mark.slow
def test_bad_photos_are_set_aside_and_folders_with_too_few_are_named() -> None:
    results = photos.play(None, 1)
    assert len(results) == 10 and not [result for result in results if not result.survived]


def test_a_bad_photo_that_nobody_set_aside_is_found(tmp_path: Path) -> None:
    [problem] = photos._a_file(tmp_path, photos.photo(), "undecodable")
    assert problem == "7 photos usable, set aside {}; 6 and {'undecodable': 1} were right"


def test_a_folder_that_nobody_complains_about_is_found(tmp_path: Path) -> None:
    assert photos._a_folder(tmp_path, 4) == ["nobody noticed"]


# --- the verdict on a lie
# ---------------------------------------------------------------------------------------------------------

HONEST = {"site-1": "1", "site-2": "2"}


@pytest.mark.parametrize(
    ("name", "refused", "counted", "log", "well"),
    [
        ("NaN", ["site-3"], HONEST, "", True),
        ("NaN", [], HONEST | {"site-3": "3"}, "", False),
        ("NaN", ["site-3", "site-1"], {"site-2": "2"}, "", False),
        ("a replayed reply", [], HONEST | {"site-3": "3"}, "hostile: the first reply once more", True),
        ("a replayed reply", ["site-3"], HONEST, "hostile: the first reply once more", False),
        ("a replayed reply", [], HONEST | {"site-3": "3"}, "", False),
    ],
)
def test_a_lie_is_survived_when_its_teller_alone_is_refused(
    name: str, refused: list, counted: dict, log: str, well: bool
) -> None:
    entry = {"refused": [{"site": site, "reason": ""} for site in refused], "adapters": counted}
    assert (updates.verdict(name, entry, log) == []) is well


def test_a_lie_whose_round_never_came_is_not_survived() -> None:
    assert updates.verdict("NaN", None, "") == ["there was no such round"]


# --- the relay
# --------------------------------------------------------------------------------------------------------------------


class Echo(threading.Thread):
    """Answers what it hears, on `port`; `heard` is how much that was."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener, self.heard = socket.create_server(("127.0.0.1", 0)), 0
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return self.listener.close()
            with link, contextlib.suppress(OSError):
                while data := link.recv(65536):
                    self.heard += len(data)
                    link.sendall(data)


class Echoed(network.Relay):
    """A relay to a program that says again what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.echo = Echo()
        self.target = self.echo.port


@pytest.fixture
def relay() -> Iterator[Echoed]:
    relay = Echoed()
    yield relay
    relay.close()
    relay.echo.listener.shutdown(socket.SHUT_RDWR)
    relay.echo.join()


def test_a_relay_carries_bytes_both_ways(relay: Echoed) -> None:
    with socket.create_connection(("127.0.0.1", relay.port), 10) as link:
        link.sendall(b"a rose")
        assert link.recv(100) == b"a rose"


def test_a_cut_holds_bytes_back_and_closes_nothing(relay: Echoed) -> None:
    with socket.create_connection(("127.0.0.1", relay.port), 10) as link:
        link.sendall(b"one")
        assert link.recv(100) == b"one"
        relay.flow.clear()
        link.sendall(b"two")
        link.settimeout(0.3)
        with pytest.raises(TimeoutError):
            link.recv(100)
        relay.flow.set()
        link.settimeout(10)
        assert link.recv(100) == b"two"


def test_a_reset_comes_in_the_middle_of_a_push_and_once(relay: Echoed) -> None:
    relay.reset_after = 100_000
    with socket.create_connection(("127.0.0.1", relay.port), 10) as link, pytest.raises(ConnectionError):
        while True:
            link.sendall(bytes(50_000))
            time.sleep(0.01)
    assert relay.resets == 1 and relay.reset_after == 0 and relay.echo.heard < 2_000_000
    test_a_relay_carries_bytes_both_ways(relay)


def test_a_slow_line_delays_each_way_and_keeps_its_rate(relay: Echoed) -> None:
    relay.delay, relay.rate = 0.2, 1e6
    with socket.create_connection(("127.0.0.1", relay.port), 10) as link:
        start = time.monotonic()
        link.sendall(bytes(50_000))  # 0.4 s at 1 Mbit/s
        got = 0
        while got < 50_000:
            got += len(link.recv(65536))
        assert time.monotonic() - start > 0.2 + 0.2 + 0.4


@pytest.mark.skipif(bool(network.no_loss()), reason=network.no_loss())
def test_lost_packets_are_counted_and_afterwards_none_is_lost(relay: Echoed) -> None:
    loss = network.Loss(relay.port, 1.0)
    loss.begin()
    try:
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", relay.port), 0.5)
    finally:
        dropped = loss.end()
    assert dropped > 0 and loss.port == relay.port
    test_a_relay_carries_bytes_both_ways(relay)
    assert f":{relay.port} " not in network.iptables("-nvxL", "INPUT")


# --- outcomes and the table
# -------------------------------------------------------------------------------------------------------


def test_the_program_fails_when_a_case_was_not_survived_and_a_skip_or_a_stock_hub_is_no_failure() -> None:
    good, skipped = Outcome("a", True), Outcome("b", False, skipped="no root")
    poisoned = Outcome("a", False, hub="stock", problems=["1 tensors have numbers that are not finite"])
    assert not outcome.failed([good, skipped, poisoned])
    assert outcome.failed([good, Outcome("a", False)])


def test_percentiles_by_hand() -> None:
    assert (
        outcome.percentile([5, 1, 4, 2, 3], 0.5) == 3
        and outcome.percentile([5, 1, 4, 2, 3], 0.95) == 5
        and outcome.percentile([7], 0.5) == 7
    )


def test_the_table_counts_repeats_survivors_resumed_runs_and_losses(tmp_path: Path) -> None:
    outcomes = [
        Outcome("a kill", True, 4.0), Outcome("a kill", True, 8.0, how="resumed"),
        Outcome("a kill", False, None, 2, ["lost: one", "lost: two"]), Outcome("NaN", True),
        Outcome("NaN", False, hub="stock", problems=["1 tensors have numbers that are not finite"]),
        Outcome("a disk", False, skipped="no root"),
    ]  # fmt: skip
    outcome.write(tmp_path / "o.json", outcomes)
    assert outcome.read(tmp_path / "o.json") == outcomes and outcome.read(tmp_path / "none.json") == []
    assert outcome.markdown(outcomes).splitlines()[4:] == [
        "| a kill | 3 | 2 (1 by resume) | 4 / 8 s | 2 | – |",
        "| NaN | 1 | 1 | – | 0 | poisoned: not finite |",
        "| a disk | 0 | not tried: no root | – | – | – |",
    ]


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        ([], "the honest mean"),
        (["the run ended finished:failed", "no adapter that loads (FileNotFoundError)"], "run lost, no adapter"),
        (["it is 3.4e+05 away from the honest sites' mean"], "poisoned: 3e+05 from the honest mean"),
        (["lora_A is (1,) torch.float32, not (4, 8) torch.float32"], "another adapter: 1 tensors wrong"),
    ],
)
def test_what_became_of_a_stock_hub_in_a_word(problems: list[str], said: str) -> None:
    [row] = outcome.rows([Outcome("x", not problems, hub="stock", problems=problems)])
    assert row["stock"] == said


def test_the_command_names_its_cases_and_takes_a_pattern() -> None:
    assert [case.group for case in faults.chosen(["^disk", "^database"])] == ["database", "disk", "disk"]
    assert faults.chosen([]) == faults.CASES and len({case.name for case in faults.CASES}) == len(faults.CASES)


def test_the_command_lists_the_cases_that_a_pattern_names() -> None:
    listed = sh("scripts/faults --only '^docker' --list", tiny.ROOT).stdout.splitlines()
    assert listed == [f"docker: {case.name}" for case in containers.CASES] and len(listed) == 10


def test_the_page_has_a_row_for_every_case() -> None:
    page = (tiny.ROOT / "docs" / "faults.md").read_text()
    for case in (
        *faults.CASES,
        *(Case("updates", name) for name in updates.ALL),
        *(Case("photos", name) for name in photos.FILES),
    ):
        assert case.play or f"| {case.name} |" in page, case.name
