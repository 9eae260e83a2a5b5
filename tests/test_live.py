"""The hub's page: what it shows of runs in any state, what it answers and to whom, and how a real browser shows it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from app.errors import BouquetError
from benchmarks import browser as browser_
from bouquet import ROOT
from bouquet.hub import roster
from bouquet.hub.live import view
from bouquet.hub.live.server import application
from bouquet.hub.live.sites import Known, Sites
from tests.kit.runs import HOSTILE, history, written
from tests.kit.wait import PATIENT, until

HOME = "http://127.0.0.1"


def site(name: str, state: str = "online", seen: str | None = "2026-11-28T05:00:00+00:00") -> roster.Site:
    return roster.Site(name, state, seen, roster.Key("ecdsa x"), 1)


KNOWN = Known(
    (site("rose"), site("lily", "offline"), site("garden", "admitted", None), site("old", "revoked")),
    "",
    1_700_000_000.0,
)


def run(
    root: Path, name: str, rounds: int = 3, state: str = "finished", sheet: bool = False, status: dict | None = None
) -> Path:
    """A run's folder; status is what status.json says."""
    told = history(rounds=rounds, state=state, wanted=3)
    told["run"] = name
    folder = root / name
    written(folder, told, sheet=sheet)
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


class Page:
    """The application without a socket: `page(root).get("/")`."""

    def __init__(self, application) -> None:
        self.application = application

    def request(self, method: str, path: str, **how) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.application), base_url=HOME) as client:
                return await client.request(method, path, **how)

        return asyncio.run(ask())

    def get(self, path: str, **how) -> httpx.Response:
        return self.request("GET", path, **how)


def page(root: Path, known: Known = KNOWN) -> Page:
    return Page(application(root, lambda: known))


def text(html: str) -> str:
    """What a person reads, on one line."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


# --- what it shows
# ---------------------------------------------------------------------------------------------------------


def test_the_run_that_works_is_told_with_who_has_replied_and_who_has_not(tmp_path):
    run(tmp_path, "6", state="failed")
    run(
        tmp_path,
        "7",
        rounds=1,
        state="running",
        status={"round": 2, "replied": ["rose"], "missing": ["lily"], "state": "waiting", "deadline": time.time() + 60},
    )
    shown = text(page(tmp_path).get("/").text)
    assert "What is it doing?" in shown and "Run 7: round 2 of 3, waiting." in shown
    assert "Replied: rose." in shown and re.search(r"Not yet: lily, until \d\d:\d\d:\d\d UTC", shown)
    assert "rounds 1 of 3" in shown and "still to come, about 40 s" in shown  # two rounds of 20 s
    assert "1 of 3 sites online" in shown  # rose; lily is offline, garden has never come, old is revoked


def test_sites_are_told_with_their_state_and_what_they_did_in_all_runs(tmp_path):
    run(tmp_path, "6")
    run(tmp_path, "7", rounds=2, state="failed")
    rows = {row["name"]: row for row in view.sites(view.Runs(tmp_path).all(), KNOWN)}
    assert list(rows) == ["garden", "lily", "old", "rose"]
    assert (rows["rose"]["rounds"], rows["rose"]["images"], rows["garden"]["rounds"]) == (5, 60, 0)
    assert (rows["lily"]["seen"], rows["rose"]["seen"]) == ("2026-11-28 05:00 UTC", "")


def test_a_site_that_is_missed_and_offline_is_told_from_one_at_work(tmp_path):
    run(tmp_path, "7", rounds=1, state="running", status={"replied": [], "missing": ["rose", "lily"]})
    doing = {row["name"]: row["doing"] for row in view.sites(view.Runs(tmp_path).all(), KNOWN)}
    assert (doing["rose"], doing["lily"], doing["garden"]) == ("at work", "missing", "")


def test_a_site_whose_operator_has_not_decided_or_has_declined_is_told_from_one_at_work(tmp_path):
    run(tmp_path, "7", rounds=1, state="running", status={"undecided": ["rose"], "declined": ["lily"]})
    doing = {row["name"]: row["doing"] for row in view.sites(view.Runs(tmp_path).all(), KNOWN)}
    assert (doing["rose"], doing["lily"]) == ("waits for its operator's consent", "has declined")


def test_a_site_at_work_is_told_with_since_when_and_how_long_it_took_the_last_time(tmp_path):
    since = time.time() - 80
    waits = {
        "state": "waiting",
        "replied": [],
        "missing": ["rose", "lily"],
        "since": since,
        "took": {"rose": 48.3, "lily": 3},
    }
    run(tmp_path, "7", rounds=1, state="running", status=waits)
    client = page(tmp_path)
    assert f"rose online at work since {view.clock(since)}, 48 s the last time" in text(client.get("/now").text)
    assert "05:00 UTC missing 40" in text(client.get("/now").text)  # lily is offline
    # time goes on, the page stays
    assert client.get("/now", headers={"If-None-Match": client.get("/now").headers["etag"]}).status_code == 304


def test_without_a_run_it_says_how_to_start_one(tmp_path):
    shown = text(page(tmp_path, Known()).get("/").text)
    assert (
        "No run yet." in shown and "flwr run . remote-deployment --stream" in shown and "asking for its sites" in shown
    )


def test_a_hub_that_does_not_answer_is_said_and_what_was_known_stays(tmp_path):
    shown = text(page(tmp_path, Known(KNOWN.sites, "The hub does not answer.", KNOWN.at)).get("/").text)
    assert (
        "The hub does not answer. The sites below are as they were at 2023-11-14 22:13 UTC." in shown
        and "rose online" in shown
    )


def test_a_run_that_cannot_be_read_is_left_out_and_the_others_are_shown(tmp_path):
    run(tmp_path, "6")
    for name, content in {"7": "{", "8": "[]", "9": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.json").write_text(content)
    assert [seen.folder.name for seen in view.Runs(tmp_path).all()] == ["6"]
    assert page(tmp_path).get("/").status_code == 200


def test_a_run_of_every_state_and_age_has_its_line(tmp_path):
    for number, state in enumerate(("finished", "failed", "running"), start=1):
        folder = run(tmp_path, str(number), rounds=number - 1 if state != "finished" else 3, state=state)
        os.utime(folder / "history.json", (number, number))
    shown = page(tmp_path).get("/").text
    assert re.findall(r'<th><a href="/runs/(\d)">', shown) == ["3", "2", "1"]


def test_of_many_runs_the_newest_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "SHOWN", 2)
    for number in range(5):
        run(tmp_path, str(number))
    shown = page(tmp_path).get("/").text
    assert len(re.findall(r'<th><a href="/runs/', shown)) == 2 and "and 3 older" in shown


def test_what_a_site_says_is_text(tmp_path):
    told = history(losses={HOSTILE: [0.3, 0.2, 0.1, 0.1], "lily": [0.4, 0.3, 0.2, 0.1]}, state="running")
    for entry in told["rounds"]:
        entry["sites"][HOSTILE]["gpu"] = HOSTILE
    written(tmp_path / "7", told | {"error": HOSTILE})
    (tmp_path / "7" / "status.json").write_text(json.dumps({"missing": [HOSTILE], "state": HOSTILE}))
    shown = page(tmp_path, Known((site(HOSTILE),), HOSTILE, 1.0)).get("/").text
    assert HOSTILE not in shown and shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6


# --- what it answers, and to whom
# ------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_sent_again(tmp_path):
    run(tmp_path, "7", rounds=1, state="running")
    client = page(tmp_path)
    first = client.get("/now")
    assert first.status_code == 200 and "round 2 of 3" in text(first.text)
    assert client.get("/now", headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    run(tmp_path, "7", rounds=2, state="running")
    second = client.get("/now", headers={"If-None-Match": first.headers["etag"]})
    assert second.status_code == 200 and "round 3 of 3" in text(second.text)


def test_the_report_of_a_run_is_the_reports_page(tmp_path):
    run(tmp_path, "7")
    answer = page(tmp_path).get("/runs/7")
    assert "Did it work?" in answer.text and "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_runs_files_are_fetched_whole_and_no_others(tmp_path):
    folder = run(tmp_path, "7")
    (folder / "final").mkdir(exist_ok=True)
    (folder / "final" / "kohya.safetensors").write_bytes(b"\x01" * 70_000)
    (folder / "worth.json").write_text("{}")
    client = page(tmp_path)
    answer = client.get("/runs/7/kohya.safetensors")
    assert (
        answer.content == b"\x01" * 70_000 and 'filename="7-kohya.safetensors"' in answer.headers["content-disposition"]
    )
    for path in (
        "/runs/7/worth.json",
        "/runs/7/status.json",
        "/runs/7/adapter_model.safetensors",
        "/runs/8/history.json",
        "/part/view.py",
    ):
        assert client.get(path).status_code == 404, path


@pytest.mark.parametrize(
    "path", ["/runs/%2e%2e", "/runs/latest", "/runs/7%2f..%2f..", "/runs/٧", "/runs/" + "7" * 50, "/runs/link", "/x"]
)
def test_a_path_leads_nowhere_else(tmp_path, path):
    run(tmp_path / "runs", "7")
    (tmp_path / "runs" / "latest").symlink_to("7")
    (tmp_path / "history.json").write_text("{}")
    assert page(tmp_path / "runs").get(path).status_code == 404


def test_a_link_is_no_run(tmp_path):
    run(tmp_path / "elsewhere", "7")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "8").symlink_to(tmp_path / "elsewhere" / "7")
    assert page(tmp_path / "runs").get("/runs/8").status_code == 404 and view.Runs(tmp_path / "runs").all() == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_asked_of_it_but_to_show(tmp_path, method):
    assert page(tmp_path).request(method, "/").status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "hub.example.org:8445"])
def test_a_name_that_is_not_this_hosts_is_refused(tmp_path, host):
    """Against DNS rebinding: a page of somebody else's reaches 127.0.0.1 under its own name."""
    assert page(tmp_path).get("/", headers={"Host": host}).status_code == 400


def test_every_answer_forbids_frames_sniffing_and_other_scripts(tmp_path):
    run(tmp_path, "7")
    client = page(tmp_path)
    for path in ("/", "/now", "/part/live.js", "/runs/7", "/runs/7/history.json", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY", path
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]


# --- the hub's list
# --------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_in_the_background_and_a_hub_that_is_gone_is_said(monkeypatch):
    answers = iter([[site("rose")], BouquetError("HOST-08", did="does not answer", found="x", fix="y")])
    asked = threading.Semaphore(0)

    def registered():
        asked.release()
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(roster, "registered", registered)
    with Sites(every=0.05) as sites:
        assert asked.acquire(timeout=PATIENT) and asked.acquire(timeout=PATIENT)
        sites.closed.set()
        sites.thread.join(10)
        assert [one.name for one in sites.now().sites] == ["rose"] and "The hub does not answer." in sites.now().trouble


# --- the command
# -----------------------------------------------------------------------------------------------------------


def command(*args: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["scripts/bouquet", "hub", "page", *args],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_says_where_the_page_is_and_ends_with_ctrl_c(tmp_path):
    run(tmp_path / "runs", "7")
    process = command("--port", "0", BOUQUET_ADAPTERS=str(tmp_path / "runs"), FLWR_HOME=str(tmp_path / "flwr"))
    try:
        line = process.stdout.readline()
        address = re.fullmatch(r"live: (http://127\.0\.0\.1:\d+)   Ctrl-C ends it\n", line)[1]
        with urllib.request.urlopen(f"{address}/runs/7", timeout=PATIENT) as answer:
            assert b"Did it work?" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stdout.read() == ""
    finally:
        process.kill()
        process.stdout.close()


def test_a_port_that_is_taken_and_a_folder_that_is_absent_are_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = command("--port", str(other.getsockname()[1]), BOUQUET_ADAPTERS=str(tmp_path))
        said, _ = taken.communicate(timeout=PATIENT)
    assert taken.returncode == 1 and said.startswith("HOST-04  The hub's port is taken.")
    absent = command("--port", "0", BOUQUET_ADAPTERS=str(tmp_path / "nowhere"))
    said, _ = absent.communicate(timeout=PATIENT)
    assert absent.returncode == 1 and said.startswith("LIVE-01  There is no folder of runs here.")


# --- in a real browser
# -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Path, str, uvicorn.Server]]:
    """(folder of runs, the page's address, the server): one run works, one is done, and one site's name is hostile."""
    root = tmp_path / "runs"
    run(root, "6", sheet=True)
    told = history(rounds=1, state="running", losses={HOSTILE: [0.30, 0.20], "lily": [0.40, 0.30]})
    written(root / "7", told, sheet=True)
    (root / "7" / "status.json").write_text(
        json.dumps({"round": 2, "replied": ["lily"], "missing": [HOSTILE], "state": "waiting"})
    )
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.listen()
    config = uvicorn.Config(application(root, lambda: KNOWN), log_level="warning", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([door],))
    thread.start()
    yield root, f"http://127.0.0.1:{door.getsockname()[1]}/", server
    server.should_exit = True
    thread.join(20)
    door.close()


def shows(browser: browser_.Browser, question: str) -> bool:
    return until(lambda: browser.js(question), lambda: question)


def test_the_page_shows_itself_and_renews_itself_without_a_complaint(browser, served):
    root, address, _ = served
    browser.look(1100)
    browser.visit(address)
    assert browser.js("document.querySelector('.outcome').textContent").startswith("Run 7: round 2 of 3")
    assert browser.js("[...document.images].length") == 4 and browser.js(
        "[...document.images].every(i => i.naturalWidth > 0)"
    )
    assert (
        HOSTILE in browser.js("document.querySelector('#run').textContent")
        and browser.js("document.scripts.length") == 1
    )
    told = history(rounds=2, state="running", losses={HOSTILE: [0.30, 0.20, 0.19], "lily": [0.40, 0.30, 0.29]})
    (root / "7" / "history.json").write_text(json.dumps(told))
    assert shows(browser, "document.querySelector('.outcome').textContent.startsWith('Run 7: round 3 of 3')")
    assert browser.complaints() == []


def test_when_nobody_answers_any_more_the_page_says_so_and_keeps_what_it_had(browser, served):
    _, address, server = served
    browser.visit(address)
    server.should_exit = True
    assert shows(browser, "document.body.classList.contains('stale')")
    assert "Nobody answers any more" in browser.js("document.getElementById('fresh').textContent")
    assert "Run 7" in browser.js("document.querySelector('#run').textContent")


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_no_width_scrolls_sideways(browser, served, width):
    browser.look(width)
    browser.visit(served[1])
    assert browser.js("document.documentElement.scrollWidth") <= width


def test_light_and_dark_have_their_colours(browser, served):
    seen = []
    for dark in (False, True):
        browser.look(1100, dark=dark)
        browser.visit(served[1])
        seen.append(browser.js("getComputedStyle(document.documentElement).color"))
    assert seen == ["rgb(36, 34, 30)", "rgb(235, 232, 226)"]
