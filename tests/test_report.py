"""The report: what it concludes from hand-made numbers, what it shows of a run in any state, and how a real browser shows it."""

from __future__ import annotations

import base64
import copy
import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT, sh
from PIL import Image
from safetensors.numpy import save_file

from app import checkpoint, export, sample
from app.errors import BouquetError
from scripts import _browser
from scripts._report import charts, findings, pictures, progress, reading, shots, worth
from scripts._report.page import page

PROMPTS = "a red poppy, meadow background|a white lily, night background"
HOSTILE = "<script>alert(1)</script>"
REASON = "HUB-05  The reply's metrics are missing or impossible."


def history(rounds: int = 3, wanted: int = 3, state: str = "finished", losses: dict[str, list[float]] | None = None) -> dict:
    """A run as server_app.py writes it: two sites of 60 and 40 images, whose validation losses are given after 0, 1, ... rounds."""
    losses = losses or {"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.40, 0.30, 0.26, 0.25]}
    images = dict(zip(losses, (60, 40, 50, 50), strict=False))
    total = sum(images.values())
    measured = min(rounds + 1, min(map(len, losses.values())))
    return {
        "run": "7",
        "state": state,
        "config": {"base_model": "mini", "rounds": wanted, "resolution": 64, "batch_size": 16, "local_steps": 10, "sample_prompts": PROMPTS},
        "base": {"name": "mini", "fingerprint": "b" * 64},
        "versions": {"torch": "2.13.0"},
        "rounds": [
            {
                "round": n,
                "started_from": f"{n - 1:064x}",
                "adapter": f"{n:064x}",
                "train_loss": 0.2 / n,
                "seconds": 20.0,
                "sites": {
                    site: {"num-examples": images[site], "train-loss": 0.2 / n, "validation-loss": losses[site][n - 1], "seconds-encode": 1.0, "seconds-load": 2.0, "seconds-train": 8.0}
                    for site in losses
                },
                "refused": [],
            }
            for n in range(1, rounds + 1)
        ],
        "validation": [
            {"after_round": k, "weighted": sum(values[k] * images[s] for s, values in losses.items()) / total, "sites": {s: v[k] for s, v in losses.items()}}
            for k in range(measured)
        ],
        "seconds": 61.0,
    }  # fmt: skip


def a_run(told: dict, folder: Path = Path("/nowhere"), **more) -> reading.Run:
    return reading.Run(folder, told, **more)


def written(folder: Path, told: dict, sheet: bool = False) -> Path:
    """The run's folder on a disk; with `sheet`, samples.png as app/sample.py draws it, a shade a row and a prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.json").write_text(json.dumps(told))
    if sheet:
        names = ["base", *(f"round {n}" for n in range(1, len(told["rounds"]) + 1))]
        rows = [[Image.new("RGB", (64, 64), (40 * y, 200 * x, 90)) for x in range(2)] for y in range(len(names))]
        sample.grid(rows, names, [text.strip() for text in PROMPTS.split("|")]).save(folder / "samples.png")
    return folder


# --- did it work? -----------------------------------------------------------------------------------------------------


def test_a_run_that_lowered_the_loss_everywhere_worked():
    # 0.6 · 0.30 + 0.4 · 0.40 = 0.34 and 0.6 · 0.15 + 0.4 · 0.25 = 0.19; 0.19 / 0.34 = 0.559
    assert findings.outcome(a_run(history())) == "Yes: the validation loss fell from 0.3400 to 0.1900 (−44 %), and at every site."


def test_a_site_that_gained_nothing_is_named_beside_the_yes():
    run = a_run(history(losses={"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.20, 0.19, 0.2, 0.21]}))
    assert findings.outcome(run).endswith(", but not at lily.")


def test_a_loss_that_rose_is_a_no_and_one_that_stayed_is_hardly():
    assert findings.outcome(a_run(history(losses={"rose": [0.20, 0.2, 0.2, 0.22]}))).startswith("No: the validation loss rose from 0.2000 to 0.2200 (+10 %)")
    assert findings.outcome(a_run(history(losses={"rose": [0.20, 0.2, 0.2, 0.1995]}))).startswith("Hardly: ")


def test_a_failed_run_is_a_no_and_a_working_one_is_not_known_yet():
    assert findings.outcome(a_run(history(2, 3, "failed"))) == "No: the run failed after 2 of 3 rounds."
    assert findings.outcome(a_run(history(0, 3, "running"))).startswith("Not known yet: the run is working, 0 of 3 rounds are done")


# --- what to look at --------------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warnings():
    assert findings.warnings(a_run(history())) == []


def test_a_site_whose_loss_rises_is_named_with_both_numbers():
    run = a_run(history(losses={"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.20, 0.19, 0.2, 0.21]}))
    [sentence] = findings.warnings(run)
    assert sentence.startswith("lily's validation loss rose from 0.2000 to 0.2100 (+5 %)")


def test_a_loss_that_turned_three_rounds_ago_is_named_although_it_is_below_the_first():
    run = a_run(history(losses={"rose": [0.40, 0.20, 0.21, 0.22]}))
    assert list(findings.rising(run)) == []
    run.validation.append({"after_round": 4, "weighted": 0.23, "sites": {"rose": 0.23}})
    [sentence] = findings.rising(run)
    assert sentence.startswith("rose's validation loss has risen for three rounds, from 0.2000 to 0.2300")


def test_an_update_far_from_the_others_is_named_and_a_near_one_is_not():
    told = history(losses={"rose": [0.3, 0.2, 0.16, 0.15], "lily": [0.3, 0.2, 0.16, 0.15], "iris": [0.3, 0.2, 0.16, 0.15]})
    for number, norms in enumerate(((1.0, 1.2, 2.9), (1.0, 1.2, 4.4), (1.0, 3.0, 3.0))):
        for site, norm in zip(("rose", "lily", "iris"), norms, strict=True):
            told["rounds"][number]["sites"][site]["update-norm"] = norm
    [sentence] = findings.far_norms(a_run(told))  # round 2: 4.4 / median(1.0, 1.2) = 4.0; round 1: 2.9 / 1.1 < 3
    assert sentence.startswith("iris's update was 4.0 times as long as the other sites' in round 2:")


def test_of_two_sites_the_longer_update_alone_is_named():
    told = history(rounds=1)
    told["rounds"][0]["sites"]["rose"]["update-norm"], told["rounds"][0]["sites"]["lily"]["update-norm"] = 8.0, 2.0
    [sentence] = findings.far_norms(a_run(told))
    assert sentence.startswith("rose's update was 4.0 times")


def test_refused_and_missing_sites_are_named_once_with_their_rounds():
    told = history()
    del told["rounds"][1]["sites"]["lily"], told["rounds"][2]["sites"]["lily"]
    told["rounds"][1]["refused"] = [{"site": "lily", "reason": REASON}]
    told["refused_final_evaluation"] = [{"site": "lily", "reason": "HUB-03  No reply within 10 s."}]
    assert findings.warnings(a_run(told)) == [
        "lily was left out of rounds 2, last evaluation: HUB-03  No reply within 10 s.",
        "lily did not take part in round 3.",
    ]


def test_a_chain_of_adapters_that_is_broken_is_named():
    told = history()
    told["rounds"][1]["started_from"] = "f" * 64
    assert findings.warnings(a_run(told)) == ["Round 2 did not start from round 1's adapter."]


def test_one_site_that_weighs_nearly_everything_is_named():
    told = history()
    for entry in told["rounds"]:
        entry["sites"]["rose"]["num-examples"], entry["sites"]["lily"]["num-examples"] = 90, 10
    assert findings.warnings(a_run(told)) == ["rose weighs 90 % in the mean: the result is nearly its own."]


def test_a_site_that_the_others_wait_for_is_named():
    told = history()
    for entry in told["rounds"]:
        entry["sites"]["lily"]["seconds-train"] = 41.0
    assert findings.warnings(a_run(told)) == ["lily works 44 s a round, the others 11 s: every round waits for it."]


def test_a_run_that_has_fallen_silent_is_named():
    told = history(1, 3, "running")
    assert list(findings.silent(a_run(told, written=0, now=3599))) == []
    [sentence] = findings.silent(a_run(told, written=0, now=7200))
    assert sentence.startswith("The run has written nothing for 2.0 h")


def test_photos_that_were_set_aside_are_counted_by_reason():
    told = history()
    told["rounds"][-1]["sites"]["rose"] |= {"photos-undecodable": 2, "photos-duplicate": 1}
    [sentence] = findings.warnings(a_run(told))
    assert sentence.startswith("rose set aside 3 of its files (1 duplicate, 2 undecodable)")


@pytest.fixture(scope="module")
def final(tmp_path_factory) -> Path:
    """A run's folder with the app's own final files of a small adapter."""
    run = tmp_path_factory.mktemp("final")
    export.write_final(run, tiny.adapter(1), tiny.CONFIG, {"adapter_sha256": "0" * 64})
    return run


def test_the_apps_own_final_files_have_alpha_equal_to_rank(final):
    files = sorted((final / "final").rglob("*.safetensors"))
    assert len(files) >= 2 and all(findings.scales(file) == {1.0} for file in files)


def test_an_alpha_that_is_not_the_rank_is_named_in_peft_in_metadata_and_in_tensors(tmp_path, final):
    (tmp_path / "final").mkdir()
    peft = tmp_path / "final" / "adapter_model.safetensors"
    peft.write_bytes((final / "final" / "adapter_model.safetensors").read_bytes())
    settings = json.loads((final / "final" / "adapter_config.json").read_text()) | {"lora_alpha": 1}
    (tmp_path / "final" / "adapter_config.json").write_text(json.dumps(settings))
    down, up = np.zeros((4, 8), np.float32), np.zeros((8, 4), np.float32)
    kohya = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up, "lora_unet_x.alpha": np.array(8.0, np.float32)}
    save_file(kohya, tmp_path / "final" / "kohya.safetensors")
    notes = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    save_file({"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up}, tmp_path / "final" / "z.safetensors", metadata=notes)
    found = [(name, ratio) for s in findings.adapter_files(a_run({}, tmp_path)) for name, ratio in re.findall(r"^(\S+).*= ([\d.]+)\)", s)]
    assert found == [("final/adapter_model.safetensors", "0.5"), ("final/kohya.safetensors", "2"), ("final/z.safetensors", "0.5")]


def test_a_final_file_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"\x10")
    assert list(findings.adapter_files(a_run({}, tmp_path))) == ["final/adapter_model.safetensors cannot be read."]


# --- was joining worth it? --------------------------------------------------------------------------------------------


def compared(alone, federated, base=(0.30,), **more) -> dict:
    return {"held_out": 20, "loss": {"base": list(base), "alone": alone, "federated": federated}} | more


def test_the_interval_is_students_t():
    # 1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303, so 4.303 / √3 = 2.484
    mean, half = worth.interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(2.4844, abs=1e-4)
    assert worth.interval([5.0]) == (5.0, None)


def test_a_gain_larger_than_the_seeds_differ_is_a_yes_with_its_interval():
    # gains 0.10, 0.11, 0.12: mean 11.0 %, sd 0.01, half 4.303 · 0.01 / √3 = 2.5 %
    found = worth.verdict("rose", compared([0.200, 0.200, 0.200], [0.180, 0.178, 0.176]))
    assert (found.site, found.answer) == ("rose", "yes")
    assert found.sentence == (
        "Yes: on its own 20 held-out photos the federated adapter's loss is 11.0 % lower than with training alone "
        "(95 % interval 8.5 % to 13.5 % lower, 3 seeds)."
    )


def test_a_loss_larger_than_the_seeds_differ_is_a_no():
    found = worth.verdict("rose", compared([0.200, 0.200, 0.200], [0.220, 0.222, 0.224]))
    assert found.answer == "no"
    assert found.sentence.startswith("No: on its own 20 held-out photos the federated adapter's loss is 11.0 % higher than with training alone")
    assert "(95 % interval 8.5 % to 13.5 % higher, 3 seeds)" in found.sentence


def test_a_gain_within_the_seeds_differences_is_not_shown():
    # gains 0.10, −0.05, 0.01: mean 2.0 %, sd 0.0755, half 18.8 %
    found = worth.verdict("rose", compared([0.200, 0.200, 0.200], [0.180, 0.210, 0.198]))
    assert found.answer == "not shown" and found.sentence.startswith("Not shown: ")
    assert "(95 % interval 16.8 % higher to 20.8 % lower, 3 seeds)" in found.sentence


def test_one_seed_cannot_tell():
    found = worth.verdict("rose", compared([0.2], [0.1]))
    assert found.answer == "cannot tell" and found.sentence.startswith("Cannot tell from one seed: ") and "(1 seed: no interval)" in found.sentence


def test_where_training_alone_is_worse_than_not_training_the_base_is_the_rival():
    found = worth.verdict("rose", compared([0.40, 0.41, 0.42], [0.35, 0.36, 0.37], base=(0.30, 0.30, 0.30)))
    assert found.answer == "no" and "higher than with the base model" in found.sentence


def test_a_better_judgement_beside_a_worse_loss_is_partly_and_says_both():
    judged = {"base": [0.03], "alone": [0.60, 0.62, 0.61], "federated": [0.83, 0.84, 0.85]}
    found = worth.verdict("rose", compared([0.200] * 3, [0.220, 0.222, 0.224], judge=judged))
    assert found.answer == "partly"
    assert "the judge sees what was asked for in 84 % of its pictures against 61 % with training alone" in found.sentence
    # differences 23, 22, 24 points: mean 23, sd 1, half 2.48
    assert "(95 % interval of the difference +21 to +25 points)" in found.sentence


def test_two_answers_become_one():
    assert worth.together(["yes", "not shown"]) == "yes"
    assert worth.together(["no", "not shown"]) == "no"
    assert worth.together(["not shown", "not shown"]) == "not shown"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda site: site["loss"].pop("federated"),
        lambda site: site["loss"]["alone"].append(0.1),
        lambda site: site["loss"]["alone"].__setitem__(0, float("nan")),
        lambda site: site["loss"]["alone"].__setitem__(0, 0),
        lambda site: site["loss"].update({"<b>": [1, 1, 1]}),
        lambda site: site.pop("held_out"),
    ],
)
def test_a_comparison_of_another_shape_is_refused_by_name(spoil):
    site = compared([0.2] * 3, [0.1] * 3)
    worth.check(told := {"seeds": [1, 2, 3], "sites": {"rose": site}})
    spoil(site)
    with pytest.raises(BouquetError, match="REPORT-04"):
        worth.check(told)


# --- pictures and charts ----------------------------------------------------------------------------------------------


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")).astype(int)


def test_the_sheet_is_cut_into_the_pictures_it_was_made_of(tmp_path):
    told = history()
    found = pictures.cut(written(tmp_path / "7", told, sheet=True) / "samples.png", told["config"], 3)
    assert found["rounds"] == [0, 1, 2, 3] and [p["text"] for p in found["prompts"]] == PROMPTS.split("|")
    for x, prompt in enumerate(found["prompts"]):
        for y, uri in enumerate(prompt["pictures"]):
            assert np.abs(decoded(uri) - (40 * y, 200 * x, 90)).max() <= 4  # the whole picture is one shade: no edge was caught


@pytest.mark.parametrize("resolution", [64, 176, 232, 512])
def test_the_sheet_is_understood_whatever_its_names_and_sizes(tmp_path, resolution):
    text = "a photo of a " + "rather " * 9 + "long prompt, in one line|another"
    rows = [[Image.new("RGB", (8, 8), (9, 200, 90))] * 2] * 3
    cell = max(128, min(256, resolution))
    sample.grid(rows, ["base", "round 1", "round 2"], text.split("|"), cell).save(tmp_path / "samples.png")
    found = pictures.cut(tmp_path / "samples.png", {"sample_prompts": text, "resolution": resolution}, 2)
    assert found["rounds"] == [0, 1, 2] and found["cell"] == cell
    assert all(np.abs(decoded(uri) - (9, 200, 90)).max() <= 4 for prompt in found["prompts"] for uri in prompt["pictures"])


def test_with_kept_rounds_alone_the_rows_are_the_newest_rounds(tmp_path):
    told = history()
    sheet = written(tmp_path / "7", told, sheet=True) / "samples.png"
    assert pictures.cut(sheet, told["config"], 10)["rounds"] == [0, 8, 9, 10]


def test_of_many_rounds_some_are_shown_the_first_and_the_last_always(tmp_path):
    told = history(rounds=1)
    names = ["base", *(f"round {n}" for n in range(1, 101))]
    sample.grid([[Image.new("RGB", (8, 8))] * 2] * 101, names, PROMPTS.split("|")).save(tmp_path / "samples.png")
    found = pictures.cut(tmp_path / "samples.png", told["config"], 100)
    assert found["rounds"][:2] == [0, 1] and found["rounds"][-1] == 100 and len(found["rounds"]) + found["left_out"] == 101


def test_a_sheet_of_another_shape_is_shown_whole(tmp_path):
    Image.new("RGB", (300, 301)).save(tmp_path / "samples.png")
    assert decoded(pictures.cut(tmp_path / "samples.png", history()["config"], 3)["whole"]).shape == (301, 300, 3)


def test_a_chart_has_no_colour_font_or_name_of_its_own():
    drawn = charts.lines([[(0, 0.3), (1, 0.2)]] * 10, [(0, 0.3), (1, 0.2)], "round", "Loss") + charts.stacks([[1, 2], [3, 4]], [1, 2], "Time")
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b(?=[;\"])|DejaVu|<style|<metadata|http://(?!www\.w3\.org)", drawn)
    assert {"var(--c0)", "var(--c7)", "var(--ink)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", drawn))


def test_ids_in_two_charts_of_a_page_differ():
    one, two = (set(re.findall(r'\bid="([^"]+)"', charts.lines([[(0, 1), (1, 2)]], [], "round", title))) for title in ("A", "B"))
    assert one and not one & two


# --- progress ---------------------------------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_bar_to_the_highest():
    assert progress.sparkline([8, 1, 4.5]) == "█▁▅" and progress.sparkline([2, 2]) == "▁▁" and progress.sparkline([]) == ""


def test_the_progress_line_says_round_losses_sites_and_time_left():
    told = history(2, 6, "running")
    assert progress.line(a_run(told)) == "round 2/6  validation █▃▁ 0.2000  sites 2  20 s a round  ETA 80 s"


def test_a_sites_name_cannot_move_the_cursor():
    shown = progress.line(a_run(history(1, 3, "running"), status={"missing": ["\x1b[2Jrose"]}))
    assert "waiting for �[2Jrose" in shown and "\x1b" not in shown


def test_following_prints_a_plain_line_a_round_and_ends_with_the_run(tmp_path, monkeypatch):
    folder, out, seen = written(tmp_path / "7", history(1, 3, "running")), io.StringIO(), []
    later = iter([history(1, 3, "running"), history(2, 3, "running"), history(3, 3, "finished")])
    monkeypatch.setattr(progress.time, "sleep", lambda seconds: written(folder, next(later)))
    assert progress.follow(folder, out, lambda run: seen.append(len(run.rounds))).state == "finished"
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["round 1/3", "round 2/3", "round 3/3"]
    assert out.getvalue().rstrip().endswith("finished") and seen == [1, 2, 3]


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
        for metrics in entry["sites"].values():
            metrics |= {"update-norm": 1.5, "gpu-peak-mib": 9000.0, "gpu-utilisation": 91.0, "gpu-joules": 480.0, "gpu": HOSTILE, f"photos-{HOSTILE}": 2}
    judged = {"base": [0.0], "alone": [0.6, 0.6, 0.61], "federated": [0.8, 0.8, 0.81]}
    written(folder, told, sheet=True)
    site = compared([0.2, 0.2, 0.2], [0.18, 0.178, 0.176], judge=judged)
    (folder / "worth.json").write_text(json.dumps({"seeds": [1, 2, 3], "steps": 30, "sites": {HOSTILE: site, "lily": site}}))
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
    [policy] = [a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "'unsafe-inline'" not in policy.split("script-src")[1]


def test_every_section_of_a_whole_run_is_there(tmp_path):
    text = Tags(page(rich(tmp_path / "7"))).text
    for words in ("Did it work?", "What to look at", "Pictures", "Was joining worth it?", "Refused or missing, and why", "9 000 MiB", "91 %"):
        assert words in text
    assert "1 440 J" in text and "3.00 J" in text  # 3 rounds of 480 J; over 3 · 10 steps of 16 images


@pytest.mark.parametrize(("rounds", "state"), [(0, "running"), (0, "failed"), (1, "running"), (2, "failed"), (3, "finished")])
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
    assert checkpoint.read_adapter(final / "final") and "the files agree with each other" in text


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_into_the_last_runs_folder(tmp_path):
    written(tmp_path / "adapters/7", history())
    os.symlink("7", tmp_path / "adapters/latest")
    shown = sh("scripts/report", ROOT, BOUQUET_ADAPTERS=str(tmp_path / "adapters")).stdout
    assert shown == f"report  {tmp_path / 'adapters/7/report.html'}\n"
    assert (tmp_path / "adapters/7/report.html").read_text().startswith("<!doctype html>")


def test_the_command_takes_an_id_or_a_folder_and_writes_where_it_is_told(tmp_path):
    folder = written(tmp_path / "adapters/7", history())
    adapters = {"BOUQUET_ADAPTERS": str(tmp_path / "adapters")}
    by_id = sh("scripts/report 7 --out - 2>/dev/null", ROOT, **adapters).stdout
    assert by_id.startswith("<!doctype html>") and by_id.rstrip().endswith("</html>") and not (folder / "report.html").exists()
    sh(f"scripts/report {folder} --out {tmp_path}/page.html", ROOT)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_following_a_run_that_has_failed_ends_with_1_and_leaves_its_page(tmp_path):
    folder = written(tmp_path / "7", history(2, 3, "failed") | {"error": "HUB-02  Too few valid replies."})
    done = sh(f"scripts/report {folder} --follow", ROOT, check=False)
    assert done.returncode == 1 and "round 2/3" in done.stdout and "failed  HUB-02" in done.stdout
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(("code", "make"), [("REPORT-01", lambda folder: None), ("REPORT-02", lambda folder: (folder / "history.json").write_text("{"))])
def test_a_folder_without_a_run_is_named(tmp_path, code, make):
    make(tmp_path)
    done = sh(f"scripts/report {tmp_path}", ROOT, check=False)
    assert done.returncode == 2 and done.stdout.startswith(code) and str(tmp_path) in done.stdout


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    done = sh(f"scripts/report {written(tmp_path / '7', history())} --out {tmp_path}/none/page.html", ROOT, check=False)
    assert done.returncode == 2 and done.stdout.startswith("REPORT-03")


# --- docs/report.md ---------------------------------------------------------------------------------------------------


PAGE = (ROOT / "docs" / "report.md").read_text()


def test_every_picture_of_the_page_is_one_that_the_command_makes():
    named = re.findall(r"\]\(report/([\w-]+)\.png\)", PAGE)
    assert sorted(named) == sorted(shots.SHOTS) == sorted(file.stem for file in (ROOT / "docs/report").glob("*.png"))


def test_every_warning_of_the_report_is_explained_on_the_page():
    table = PAGE[PAGE.index("| it says |") : PAGE.index("## Pictures")]
    for words in ("rose", "has risen for three rounds", "times as long", "was left out", "did not take part", "weighs", "waits for", "set aside"):
        assert words in table
        assert words in inspect.getsource(findings)


@pytest.mark.parametrize(
    ("command", "file", "words"),
    [
        ("scripts/report", "test_report.py", 'sh("scripts/report"'),
        ("scripts/report 1956480815642397762 --out run.html", "test_report.py", "--out {tmp_path}/page.html"),
        ("scripts/report --follow 1956480815642397762", "test_report.py", "scripts/report {folder} --follow"),
        ("docker compose run --rm -T operator scripts/report --out - >report.html", "test_compose.py", "scripts/report --out - >report.html"),
        ("scripts/worth measure site-1 --data DIR RUN-42 RUN-43 RUN-44", "test_worth.py", "scripts/worth measure rose --data"),
        (".venv/bin/flwr run . remote-deployment --run-config \"tracker='tensorboard'\" --stream", "test_compose.py", "tracker='tensorboard'"),
        ("docker compose --profile dashboard up -d --wait dashboard", "test_compose.py", "--profile dashboard up -d --wait dashboard"),
        ("scripts/worth collect RUN-42 site-1.worth.json site-2.worth.json", "test_worth.py", "scripts/worth collect {runs[0]}"),
    ],
)
def test_every_command_of_the_page_is_executed_by_a_test(command, file, words):
    lines = [" ".join(re.sub(r"\s#.*", "", line).split()) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert command in lines and len([line for line in lines if line.startswith("scripts/")]) == 5
    assert words in (ROOT / "tests" / file).read_text().split("# --- docs/report.md")[0]


# --- in a real browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[_browser.Browser]:
    if not _browser.find():
        if os.environ.get("BOUQUET_REQUIRE_BROWSER"):
            pytest.fail("BOUQUET_REQUIRE_BROWSER is set and there is no Chromium")
        pytest.skip("no Chromium here; Debian: apt install chromium")
    with _browser.Browser() as running:
        yield running


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    run = rich(tmp_path_factory.mktemp("browser") / "7")
    file = run.folder / "report.html"
    file.write_text(page(run))
    return file


def visible(browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('img[data-round]')].filter(i => i.offsetParent).map(i => i.dataset.round + ' ' + i.naturalWidth)")


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
    slipped.write_text(shown.read_text().replace("</main>", "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'></main>"))
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
    browser.send("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.js(ink) == "rgb(0, 0, 0)"
    browser.send("Emulation.setEmulatedMedia", media="")
    assert browser.pdf().startswith(b"%PDF")


def test_the_pictures_of_the_docs_are_made_by_the_command(browser, shown, tmp_path):
    sh(f".venv/bin/python -m scripts._report.shots {shown.parent} --out {tmp_path}", ROOT)
    sizes = {}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            sizes[file.stem] = picture.size
    assert sizes.keys() == shots.SHOTS.keys() and sizes["phone"][0] <= 360 < sizes["loss"][0]
