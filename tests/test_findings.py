"""What the report concludes from hand-made numbers: did it work, what to look at, was joining worth it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from app import records
from app.errors import BouquetError
from bouquet.report import comparison, findings, worth
from tests.kit.runs import REASON, a_run, compared, history, measured

# --- did it work? -----------------------------------------------------------------------------------------------------


def test_a_run_that_lowered_the_loss_everywhere_worked():
    # 0.6 · 0.30 + 0.4 · 0.40 = 0.34 and 0.6 · 0.15 + 0.4 · 0.25 = 0.19; 0.19 / 0.34 = 0.559
    assert (
        findings.outcome(a_run(history()))
        == "Yes: the validation loss fell from 0.3400 to 0.1900 (−44 %), and at every site."
    )


def test_a_site_that_gained_nothing_is_named_beside_the_yes():
    run = a_run(history(losses={"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.20, 0.19, 0.2, 0.21]}))
    assert findings.outcome(run).endswith(", but not at lily.")


def test_a_loss_that_rose_is_a_no_and_one_that_stayed_is_hardly():
    assert findings.outcome(a_run(history(losses={"rose": [0.20, 0.2, 0.2, 0.22]}))).startswith(
        "No: the validation loss rose from 0.2000 to 0.2200 (+10 %)"
    )
    assert findings.outcome(a_run(history(losses={"rose": [0.20, 0.2, 0.2, 0.1995]}))).startswith("Hardly: ")


def test_a_failed_run_is_a_no_and_a_working_one_is_not_known_yet():
    assert findings.outcome(a_run(history(2, 3, "failed"))) == "No: the run failed after 2 of 3 rounds."
    assert findings.outcome(a_run(history(0, 3, "running"))).startswith(
        "Not known yet: the run is working, 0 of 3 rounds are done"
    )


# --- what to look at --------------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warnings():
    assert findings.warnings(a_run(history())) == []


def test_a_site_whose_loss_rises_is_named_with_both_numbers():
    run = a_run(history(losses={"rose": [0.30, 0.20, 0.16, 0.15], "lily": [0.20, 0.19, 0.2, 0.21]}))
    [sentence] = findings.warnings(run)
    assert sentence.startswith("lily's validation loss rose from 0.2000 to 0.2100 (+5 %)")


def test_a_loss_that_turned_three_rounds_ago_is_named_although_it_is_below_the_first():
    told = history(losses={"rose": [0.40, 0.20, 0.21, 0.22]})
    assert list(findings.rising(a_run(told))) == []
    told["validation"].append({"after_round": 4, "weighted": 0.23, "sites": {"rose": 0.23}})
    [sentence] = findings.rising(a_run(told))
    assert sentence.startswith("rose's validation loss has risen for three rounds, from 0.2000 to 0.2300")


def test_an_update_far_from_the_others_is_named_and_a_near_one_is_not():
    told = history(
        losses={"rose": [0.3, 0.2, 0.16, 0.15], "lily": [0.3, 0.2, 0.16, 0.15], "iris": [0.3, 0.2, 0.16, 0.15]}
    )
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


def test_a_site_that_is_held_at_the_largest_share_is_named_with_what_it_claims_and_counts_for():
    """Of ten sites one says 999,999,999 images: 4 · 9 · 40 = 1,440 of 1,800 are 80 %, not more."""
    told = history(rounds=1)
    numbers = told["rounds"][0]["sites"].pop("rose") | {"num-examples": 40, "weight": 40}
    told["rounds"][0]["sites"] = {f"site-{n}": dict(numbers) for n in range(10)}
    told["rounds"][0]["sites"]["site-3"] |= {"num-examples": 999_999_999, "weight": 1440}
    told["rounds"][0]["sites"]["site-3"]["weight-bound"] = "largest-share"
    told["validation"] = []
    claimed, heavy = findings.warnings(a_run(told))
    assert claimed.startswith(
        "site-3 says that it has 999,999,999 images and counts for 1,440, since one site may weigh"
    )
    assert heavy == "site-3 weighs 80 % in the mean: the result is nearly its own."


def test_a_site_that_says_more_images_than_it_was_admitted_with_is_named():
    told = history()
    told["rounds"][1]["sites"]["rose"] |= {"weight": 50, "weight-bound": "admitted number"}  # it says 60
    [sentence] = findings.warnings(a_run(told))
    assert sentence.startswith("rose says that it has 60 images and counts for 50, since it was admitted with no more.")


def test_a_site_whose_reply_held_what_nobody_sends_is_named():
    told = history()
    told["rounds"][0]["sites"]["lily"]["left-out"] = 250_000
    [sentence] = findings.warnings(a_run(told))
    assert sentence.startswith("lily sent 250,000 numbers that no site of this version sends")


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


def test_captions_that_were_cut_are_counted():
    told = history()
    told["rounds"][-1]["sites"]["rose"]["captions-cut"] = 12
    [sentence] = findings.warnings(a_run(told))
    assert sentence == "rose has 12 captions longer than the base model reads: it learned from their beginnings."


def test_photos_that_were_enlarged_are_counted():
    told = history()
    told["rounds"][-1]["sites"]["rose"]["enlarged"] = 7
    [sentence] = findings.warnings(a_run(told))
    assert sentence.startswith("rose has 7 photos smaller than what is trained on")


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
    kohya = {
        "lora_unet_x.lora_down.weight": down,
        "lora_unet_x.lora_up.weight": up,
        "lora_unet_x.alpha": np.array(8.0, np.float32),
    }
    save_file(kohya, tmp_path / "final" / "kohya.safetensors")
    notes = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    save_file(
        {"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up}, tmp_path / "final" / "z.safetensors", metadata=notes
    )
    found = [
        (name, ratio)
        for s in findings.adapter_files(a_run(history(), tmp_path))
        for name, ratio in re.findall(r"^(\S+).*= ([\d.]+)\)", s)
    ]
    assert found == [
        ("final/adapter_model.safetensors", "0.5"),
        ("final/kohya.safetensors", "2"),
        ("final/z.safetensors", "0.5"),
    ]


def test_a_final_file_that_is_cut_short_is_named(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "adapter_model.safetensors").write_bytes(b"\x10")
    assert list(findings.adapter_files(a_run(history(), tmp_path))) == [
        "final/adapter_model.safetensors cannot be read."
    ]


# --- was joining worth it? --------------------------------------------------------------------------------------------


def test_the_interval_is_students_t():
    # 1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303, so 4.303 / √3 = 2.484
    mean, half = worth.interval([1, 2, 3])
    assert mean == 2 and half == pytest.approx(2.4844, abs=1e-4)
    assert worth.interval([5.0]) == (5.0, None)


def test_a_gain_larger_than_the_seeds_differ_is_a_yes_with_its_interval():
    # gains 0.10, 0.11, 0.12: mean 11.0 %, sd 0.01, half 4.303 · 0.01 / √3 = 2.5 %
    found = worth.verdict("rose", {"rose": measured([0.200, 0.200, 0.200], [0.180, 0.178, 0.176])})
    assert (found.site, found.answer) == ("rose", "yes")
    assert (
        found.sentence
        == "Yes: on its own 20 held-out photos the federated adapter's loss is 11.0 % lower than with training alone "
        "(95 % interval 8.5 % to 13.5 % lower, 3 seeds)."
    )


def test_a_loss_larger_than_the_seeds_differ_is_a_no():
    found = worth.verdict("rose", {"rose": measured([0.200, 0.200, 0.200], [0.220, 0.222, 0.224])})
    assert found.answer == "no"
    assert found.sentence.startswith(
        "No: on its own 20 held-out photos the federated adapter's loss is 11.0 % higher than with training alone"
    )
    assert "(95 % interval 8.5 % to 13.5 % higher, 3 seeds)" in found.sentence


def test_a_gain_within_the_seeds_differences_is_not_shown():
    # gains 0.10, −0.05, 0.01: mean 2.0 %, sd 0.0755, half 18.8 %
    found = worth.verdict("rose", {"rose": measured([0.200, 0.200, 0.200], [0.180, 0.210, 0.198])})
    assert found.answer == "not shown" and found.sentence.startswith("Not shown: ")
    assert "(95 % interval 16.8 % higher to 20.8 % lower, 3 seeds)" in found.sentence


def test_one_seed_cannot_tell():
    found = worth.verdict("rose", {"rose": measured([0.2], [0.1])})
    assert (
        found.answer == "cannot tell"
        and found.sentence.startswith("Cannot tell from one seed: ")
        and "(1 seed: no interval)" in found.sentence
    )


def test_where_training_alone_is_worse_than_not_training_the_base_is_the_rival():
    found = worth.verdict("rose", {"rose": measured([0.40, 0.41, 0.42], [0.35, 0.36, 0.37], base=(0.30, 0.30, 0.30))})
    assert found.answer == "no" and "higher than with the base model" in found.sentence


def test_a_better_judgement_beside_a_worse_loss_is_partly_and_says_both():
    judged = {"base": [0.03], "alone": [0.60, 0.62, 0.61], "federated": [0.83, 0.84, 0.85]}
    found = worth.verdict("rose", {"rose": measured([0.200] * 3, [0.220, 0.222, 0.224], judge=judged)})
    assert found.answer == "partly"
    assert (
        "the judge sees what was asked for in 84 % of its pictures against 61 % with training alone" in found.sentence
    )
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
def test_a_comparison_of_another_shape_is_refused_by_name(spoil, tmp_path):
    site, file = compared([0.2] * 3, [0.1] * 3), tmp_path / "worth.json"
    told = {"seeds": [1, 2, 3], "sites": {"rose": site}}
    file.write_text(json.dumps(told))
    assert comparison.read(file).sites["rose"] == records.of(comparison.Measured, site)
    spoil(site)
    file.write_text(json.dumps(told))
    with pytest.raises(BouquetError, match="REPORT-04"):
        comparison.read(file)
