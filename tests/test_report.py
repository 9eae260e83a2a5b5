"""The report: what it shows of a run in any state, and how a real browser shows it."""

from __future__ import annotations

import base64
import copy
import hashlib
import inspect
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import sh
from PIL import Image

from app import metrics
from app.adapter import sample, store
from benchmarks import shots
from bouquet import ROOT
from bouquet.report import charts, findings, pictures, reading
from bouquet.report.page import PHASES, page
from tests.kit.runs import HOSTILE, PROMPTS, a_run, compared, history, written

# --- pictures and charts ----------------------------------------------------------------------------------------------


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")).astype(int)


def test_the_sheet_is_cut_into_the_pictures_it_was_made_of(tmp_path):
    told = history()
    found = pictures.cut(written(tmp_path / "7", told, sheet=True) / "samples.png", told["config"], 3)
    assert found["rounds"] == [0, 1, 2, 3] and [p["text"] for p in found["prompts"]] == PROMPTS.split("|")
    for x, prompt in enumerate(found["prompts"]):
        for y, uri in enumerate(prompt["pictures"]):
            # the whole picture is one shade: no edge was caught
            assert np.abs(decoded(uri) - (40 * y, 200 * x, 90)).max() <= 4


@pytest.mark.parametrize("resolution", [64, 176, 232, 512])
def test_the_sheet_is_understood_whatever_its_names_and_sizes(tmp_path, resolution):
    text = "a photo of a " + "rather " * 9 + "long prompt, in one line|another"
    rows = [[Image.new("RGB", (8, 8), (9, 200, 90))] * 2] * 3
    cell = max(128, min(256, resolution))
    sample.grid(rows, ["base", "round 1", "round 2"], text.split("|"), cell).save(tmp_path / "samples.png")
    found = pictures.cut(tmp_path / "samples.png", {"sample_prompts": text, "resolution": resolution}, 2)
    assert found["rounds"] == [0, 1, 2] and found["cell"] == cell
    assert all(
        np.abs(decoded(uri) - (9, 200, 90)).max() <= 4 for prompt in found["prompts"] for uri in prompt["pictures"]
    )


def test_with_kept_rounds_alone_the_rows_are_the_newest_rounds(tmp_path):
    told = history()
    sheet = written(tmp_path / "7", told, sheet=True) / "samples.png"
    assert pictures.cut(sheet, told["config"], 10)["rounds"] == [0, 8, 9, 10]


def test_of_many_rounds_some_are_shown_the_first_and_the_last_always(tmp_path):
    told = history(rounds=1)
    names = ["base", *(f"round {n}" for n in range(1, 101))]
    sample.grid([[Image.new("RGB", (8, 8))] * 2] * 101, names, PROMPTS.split("|")).save(tmp_path / "samples.png")
    found = pictures.cut(tmp_path / "samples.png", told["config"], 100)
    assert (
        found["rounds"][:2] == [0, 1] and found["rounds"][-1] == 100 and len(found["rounds"]) + found["left_out"] == 101
    )


def test_a_sheet_of_another_shape_is_shown_whole(tmp_path):
    Image.new("RGB", (300, 301)).save(tmp_path / "samples.png")
    assert decoded(pictures.cut(tmp_path / "samples.png", history()["config"], 3)["whole"]).shape == (301, 300, 3)


def test_a_chart_has_no_colour_font_or_name_of_its_own():
    drawn = charts.lines([[(0, 0.3), (1, 0.2)]] * 10, [(0, 0.3), (1, 0.2)], "round", "Loss") + charts.stacks(
        [[1, 2], [3, 4]], [1, 2], "Time"
    )
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b(?=[;\"])|DejaVu|<style|<metadata|http://(?!www\.w3\.org)", drawn)
    assert {"var(--c0)", "var(--c7)", "var(--ink)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", drawn))


def test_ids_in_two_charts_of_a_page_differ():
    one, two = (
        set(re.findall(r'\bid="([^"]+)"', charts.lines([[(0, 1), (1, 2)]], [], "round", title))) for title in ("A", "B")
    )
    assert one and not one & two


# --- the page ---------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Every tag and its attributes, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rich(folder: Path) -> reading.Run:
    """A run that has everything: pictures, norms, GPUs, refusals, a comparison; every text of a site is hostile."""
    told = history(losses={HOSTILE: [0.30, 0.20, 0.16, 0.15], "lily": [0.40, 0.30, 0.26, 0.25]})
    for entry in told["rounds"]:
        entry["refused"] = [{"site": HOSTILE, "reason": f"HUB-04  {HOSTILE}"}]
        for said in entry["sites"].values():
            said |= {
                "update-norm": 1.5,
                "gpu-peak-mib": 9000.0,
                "gpu-utilisation": 91.0,
                "gpu-joules": 480.0,
                "gpu": HOSTILE,
                f"photos-{HOSTILE}": 2,
            }
    judged = {"base": [0.0], "alone": [0.6, 0.6, 0.61], "federated": [0.8, 0.8, 0.81]}
    written(folder, told, sheet=True)
    site = compared([0.2, 0.2, 0.2], [0.18, 0.178, 0.176], judge=judged)
    (folder / "worth.json").write_text(
        json.dumps({"seeds": [1, 2, 3], "steps": 30, "sites": {HOSTILE: site, "lily": site}})
    )
    (folder / "status.json").write_text(json.dumps({"round": 3, "missing": [HOSTILE], "refused": []}))
    return reading.read(folder)


def test_a_hostile_name_is_text_everywhere(tmp_path):
    text = page(rich(tmp_path / "7"))
    assert HOSTILE not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 8
    assert [attributes for tag, attributes in Tags(text).tags if tag == "script"] == [{}]


def test_the_page_carries_everything_and_names_no_address(tmp_path):
    found = Tags(page(rich(tmp_path / "7")))
    for tag, attributes in found.tags:
        assert not {"onload", "onclick", "onerror"} & attributes.keys()
        for name in ("src", "href", "xlink:href", "action", "poster"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    [policy] = [
        a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (
        policy.startswith("default-src 'none'; img-src data:;")
        and "'unsafe-inline'" not in policy.split("script-src")[1]
    )


def test_every_section_of_a_whole_run_is_there(tmp_path):
    text = Tags(page(rich(tmp_path / "7"))).text
    for words in (
        "Did it work?",
        "What to look at",
        "Pictures",
        "Was joining worth it?",
        "Refused or missing, and why",
        "9 000 MiB",
        "91 %",
    ):
        assert words in text
    assert "1 440 J" in text and "3.00 J" in text  # 3 rounds of 480 J; over 3 · 10 steps of 16 images


@pytest.mark.parametrize(
    ("rounds", "state"), [(0, "running"), (0, "failed"), (1, "running"), (2, "failed"), (3, "finished")]
)
def test_a_run_in_any_state_has_a_page(tmp_path, rounds, state):
    told = history(rounds, 3, state) | ({"error": "HUB-02  Too few valid replies."} if state == "failed" else {})
    if rounds == 0:
        told["validation"] = []
    text = Tags(page(reading.read(written(tmp_path / "7", told)))).text
    assert findings.outcome(a_run(told)) in text and f"{rounds} of 3" in text
    assert ("HUB-02 Too few valid replies." in text) == (state == "failed")
    assert ("No round was finished, so there is no adapter." in text) == (rounds == 0)
    assert ("in round-0002 of the run's folder" in text) == (rounds == 2)


def test_numbers_of_any_size_have_a_page(tmp_path):
    told = history(losses={"rose": [1e308, 1e-308, 0.0, 1e300], "lily": [0.40, 0.30, 0.26, 0.25]})
    for entry in told["rounds"]:
        entry["sites"]["rose"] |= {"seconds-train": -1e308, "update-norm": 0.0, "gpu-joules": -1.0}
        entry["sites"]["lily"] |= {"update-norm": 1e308}
    for entry in told["validation"]:
        entry["weighted"] = float("inf")
    assert "1e+308" not in page(reading.read(written(tmp_path / "7", told)))


def test_the_phases_that_the_page_names_are_those_that_a_site_sends():
    assert tuple(PHASES) == metrics.PHASES


def test_many_sites_have_a_page_with_eight_in_colour(tmp_path):
    told = history(losses={"rose": [0.3, 0.2, 0.16, 0.15]})
    for entry in told["rounds"] + told["validation"]:
        entry["sites"] = {f"site-{n}": copy.deepcopy(entry["sites"]["rose"]) for n in range(30)}
    text = Tags(page(reading.read(written(tmp_path / "7", told)))).text
    assert "and 22 more in grey" in text and "site-29" in text


def test_a_real_runs_checkpoint_and_history_have_a_page(tmp_path, final):
    """The final files' own sums are on the page."""
    told = history()
    told["rounds"][-1]["adapter"] = "0" * 64
    os.symlink(final / "final", written(tmp_path / "7", told) / "final")
    text = Tags(page(reading.read(tmp_path / "7"))).text
    assert hashlib.sha256((final / "final/pytorch_lora_weights.safetensors").read_bytes()).hexdigest() in text
    assert store.read_adapter(final / "final") and "the files agree with each other" in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_into_the_last_runs_folder(tmp_path):
    written(tmp_path / "adapters/7", history())
    os.symlink("7", tmp_path / "adapters/latest")
    shown = sh("scripts/bouquet report", ROOT, BOUQUET_ADAPTERS=str(tmp_path / "adapters")).stdout
    assert shown == f"report  {tmp_path / 'adapters/7/report.html'}\n"
    assert (tmp_path / "adapters/7/report.html").read_text().startswith("<!doctype html>")


def test_the_command_takes_an_id_or_a_folder_and_writes_where_it_is_told(tmp_path):
    folder = written(tmp_path / "adapters/7", history())
    adapters = {"BOUQUET_ADAPTERS": str(tmp_path / "adapters")}
    by_id = sh("scripts/bouquet report 7 --out - 2>/dev/null", ROOT, **adapters).stdout
    assert (
        by_id.startswith("<!doctype html>")
        and by_id.rstrip().endswith("</html>")
        and not (folder / "report.html").exists()
    )
    sh(f"scripts/bouquet report {folder} --out {tmp_path}/page.html", ROOT)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_following_a_run_that_has_failed_ends_with_1_and_leaves_its_page(tmp_path):
    folder = written(tmp_path / "7", history(2, 3, "failed") | {"error": "HUB-02  Too few valid replies."})
    done = sh(f"scripts/bouquet report {folder} --follow", ROOT, check=False)
    assert done.returncode == 1 and "round 2/3" in done.stdout and "failed  HUB-02" in done.stdout
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("code", "make"),
    [("REPORT-01", lambda folder: None), ("REPORT-02", lambda folder: (folder / "history.json").write_text("{"))],
)
def test_a_folder_without_a_run_is_named(tmp_path, code, make):
    make(tmp_path)
    done = sh(f"scripts/bouquet report {tmp_path}", ROOT, check=False)
    assert done.returncode == 1 and done.stdout.startswith(code) and str(tmp_path) in done.stdout


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    done = sh(
        f"scripts/bouquet report {written(tmp_path / '7', history())} --out {tmp_path}/none/page.html",
        ROOT,
        check=False,
    )
    assert done.returncode == 1 and done.stdout.startswith("REPORT-03")


# --- docs/report.md ---------------------------------------------------------------------------------------------------


PAGE = (ROOT / "docs" / "report.md").read_text()


def test_every_picture_of_the_page_is_one_that_the_command_makes():
    named = re.findall(r"\]\(report/([\w-]+)\.png\)", PAGE)
    assert sorted(named) == sorted(shots.SHOTS) == sorted(file.stem for file in (ROOT / "docs/report").glob("*.png"))


def test_every_warning_of_the_report_is_explained_on_the_page():
    table = PAGE[PAGE.index("| it says |") : PAGE.index("## Pictures")]
    for words in (
        "rose",
        "has risen for three rounds",
        "times as long",
        "was left out",
        "did not take part",
        "weighs",
        "waits for",
        "set aside",
    ):
        assert words in table
        assert words in re.sub(r'"\s+f?"', "", inspect.getsource(findings))  # where a text goes on in the next line


@pytest.mark.parametrize(
    ("command", "file", "words"),
    [
        ("scripts/bouquet report", "test_report.py", 'sh("scripts/bouquet report"'),
        ("scripts/bouquet report 1956480815642397762 --out run.html", "test_report.py", "--out {tmp_path}/page.html"),
        (
            "scripts/bouquet report --follow 1956480815642397762",
            "test_report.py",
            "scripts/bouquet report {folder} --follow",
        ),
        (
            "docker compose run --rm -T operator bouquet report --out - >report.html",
            "test_compose.py",
            "operator bouquet report --out - >report.html",
        ),
        (
            "scripts/bouquet worth measure site-1 --data DIR RUN-42 RUN-43 RUN-44",
            "test_worth.py",
            "scripts/bouquet worth measure rose --data",
        ),
        (
            "scripts/bouquet worth measure site-1 --data DIR RUN-42 RUN-43 RUN-44 --alone site-1.alone --others"
            " site-2.alone",
            "test_alone.py",
            '"worth", "measure", "lily", "--data"',
        ),
        (
            ".venv/bin/flwr run . remote-deployment --run-config \"tracker='tensorboard'\" --stream",
            "test_compose.py",
            "tracker='tensorboard'",
        ),
        (
            "docker compose --profile dashboard up -d --wait dashboard",
            "test_compose.py",
            "--profile dashboard up -d --wait dashboard",
        ),
        (
            "docker compose --profile dashboard up -d --wait page",
            "test_compose.py",
            "--profile dashboard up -d --wait page",
        ),
        ("scripts/bouquet hub page", "test_live.py", '["scripts/bouquet", "hub", "page", *args]'),
        (
            "scripts/bouquet worth collect RUN-42 site-1.worth.json site-2.worth.json",
            "test_worth.py",
            "scripts/bouquet worth collect {runs[0]}",
        ),
    ],
)
def test_every_command_of_the_page_is_executed_by_a_test(command, file, words):
    lines = [
        " ".join(re.sub(r"\s#.*", "", line).split())
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert command in lines and len([line for line in lines if line.startswith("scripts/")]) == 7
    assert words in (ROOT / "tests" / file).read_text().split("# --- docs/report.md")[0]


# --- in a real browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    run = rich(tmp_path_factory.mktemp("browser") / "7")
    file = run.folder / "report.html"
    file.write_text(page(run))
    return file


def visible(browser) -> list[str]:
    return browser.js(
        "[...document.querySelectorAll('img[data-round]')].filter(i => i.offsetParent).map(i => i.dataset.round + ' ' +"
        " i.naturalWidth)"
    )


def test_the_page_opens_from_disk_without_a_complaint_or_a_request(browser, shown):
    browser.look(1100)
    browser.open(shown)
    assert browser.js("document.querySelector('h1').textContent") == "Did it work?"
    assert browser.complaints() == [] and browser.requests() == []
    assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_the_slider_moves_the_pictures_and_the_words(browser, shown):
    browser.look(1100)
    browser.open(shown)
    assert visible(browser) == ["3 128", "3 128"]
    browser.js("document.getElementById('round').focus()")
    browser.key("ArrowLeft", 37)
    assert visible(browser) == ["2 128", "2 128"]
    assert browser.js("document.getElementById('shown').textContent") == "round 2, validation loss 0.2000"
    browser.key("Home", 36)
    assert visible(browser) == ["0 128", "0 128"]
    assert browser.js("document.getElementById('shown').textContent") == "base model, validation loss 0.3400"


def test_a_hostile_name_is_seen_as_text_and_runs_nothing(browser, shown):
    browser.open(shown)
    assert HOSTILE in browser.js("document.querySelector('#sites tbody').textContent")
    assert browser.js("document.scripts.length") == 1


def test_what_slips_past_escaping_would_not_run(browser, shown, tmp_path):
    """The page's own policy stops a script that is not its own: the second wall."""
    slipped = tmp_path / "slipped.html"
    slipped.write_text(
        shown.read_text().replace(
            "</main>", "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'></main>"
        )
    )
    browser.open(slipped)
    assert browser.js("window.ran === undefined") and browser.complaints()


@pytest.mark.parametrize("width", [320, 360, 768, 1400])
def test_no_width_scrolls_sideways(browser, shown, width):
    browser.look(width)
    browser.open(shown)
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js("innerWidth") == width


def test_light_dark_and_print_have_their_colours(browser, shown):
    ink = "getComputedStyle(document.documentElement).color"
    chart = "getComputedStyle(document.querySelector('#loss svg path[style*=\"--c0\"]')).stroke"
    seen = []
    for dark in (False, True):
        browser.look(1100, dark=dark)
        browser.open(shown)
        seen.append((browser.js(ink), browser.js(chart)))
    assert seen == [("rgb(36, 34, 30)", "rgb(42, 111, 219)"), ("rgb(235, 232, 226)", "rgb(110, 168, 255)")]
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.js(ink) == "rgb(0, 0, 0)"
    browser.send("Emulation.setEmulatedMedia", media="")
    assert browser.pdf().startswith(b"%PDF")


@pytest.mark.slow
def test_the_pictures_of_the_docs_are_made_by_the_command(browser, shown, tmp_path):
    sh(f".venv/bin/python -m benchmarks.shots {shown.parent} --out {tmp_path}", ROOT)
    sizes = {}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            sizes[file.stem] = picture.size
    assert sizes.keys() == shots.SHOTS.keys() and sizes["phone"][0] <= 360 < sizes["loss"][0]
