"""The checker finds nothing on a good volume, and on a volume broken in one way it says that and nothing else is
needed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app import model
from app.config import RunConfig
from app.families import of, sd
from app.hub import volume
from app.site import journal
from benchmarks import check
from tests.kit import families, tiny
from tests.kit.memory import Federation, spoil_from


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole run of two rounds at two sites, with the sites' journals and everything that they sent."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOUQUET_KEEP_SENT", "1")
        Federation(root, sample_prompts="").go(patch)
    return root


@pytest.fixture
def root(good, tmp_path):
    """A copy of it that may be broken."""
    return Path(shutil.copytree(good, tmp_path / "root", symlinks=True))


def evidence(root: Path, **other) -> check.Evidence:
    caches = {name: root / "cache" / name for name in ("site-1", "site-2")}
    return check.Evidence(root / "adapters" / "7", caches, tiny.models(), **other)


def finds(root: Path, text: str, **other) -> None:
    problems = check.check(evidence(root, **other))
    assert any(text in problem for problem in problems), problems


def edit(root: Path, **news) -> None:
    file = root / "adapters" / "7" / "history.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | news))


def edit_round(root: Path, number: int, **news) -> None:
    entries = evidence(root).history()["rounds"]
    entries[number - 1] |= news
    edit(root, rounds=entries)


def rewrite(file: Path, change) -> None:
    adapter = load_file(file)
    change(adapter)
    save_file(adapter, file)


def test_a_good_run_passes(root):
    assert check.check(evidence(root, seconds=5, limit=10, before=check.adapters(root / "adapters"))) == []


def test_its_hash_and_its_fresh_adapter_are_the_apps_which_it_does_not_import(root):
    adapter = tiny.adapter(3)
    assert check.digest(adapter) == model.adapter_hash(adapter)
    fresh = check.fresh(tiny.base(), tiny.CONFIG.lora_rank, check.TARGETS[tiny.CONFIG.lora_targets])
    assert {name: (value.shape, value.dtype) for name, value in fresh.items()} == {
        name: (value.shape, value.dtype) for name, value in tiny.fresh().items()
    }
    flux = families.base("flux")
    config = RunConfig.read({"lora-rank": 3, "lora-targets": "attention"})
    flows = check.fresh(flux, 3, set(of(flux).targets["attention"]))
    assert {name: value.shape for name, value in flows.items()} == {
        name: value.shape for name, value in model.new_adapter(flux, config).items()
    }
    assert {name: set(layers) for name, layers in sd.FAMILY.targets.items()} == check.TARGETS
    done = subprocess.run(
        [sys.executable, "-c", "import benchmarks.check, sys; print('app' in sys.modules)"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_the_command_says_so_and_ends_with_0_or_1(root):
    caches = [f"--cache=site-{n}={root / 'cache' / f'site-{n}'}" for n in (1, 2)]
    command = [
        sys.executable,
        "-m",
        "benchmarks.check",
        str(root / "adapters" / "7"),
        "--models",
        str(tiny.models()),
        *caches,
    ]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "whole"), done.stderr
    edit(root, state="failed")
    assert subprocess.run(command, cwd=tiny.ROOT, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", ["round-0001/adapter_model.safetensors", "final/provenance.json", "history.json"])
def test_half_a_file_is_found(root, name):
    file = root / "adapters" / "7" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finds(root, f"7/{name} does not load")


def test_a_file_that_nobody_cleaned_up_is_found_and_a_hidden_one_is_allowed(root):
    (root / "adapters" / "7" / ".half").write_text("{")
    assert check.check(evidence(root)) == []
    (root / "adapters" / "7" / "history.json.tmp").write_text("{")
    finds(root, "history.json.tmp is no file of a run")


def test_a_round_that_lacks_a_file_is_found(root):
    (root / "adapters" / "7" / "round-0002" / "metrics.json").unlink()
    finds(root, "round-0002 holds")


@pytest.mark.parametrize(
    ("state", "said"), [("running", "finished"), ("finished:failed", "finished"), ("finished:completed", "running")]
)
def test_an_end_that_nobody_declared_is_found(root, state, said):
    edit(root, state=said)
    finds(root, "Flower says", state=state)


def test_a_run_that_took_too_long_is_found(root):
    finds(root, "the run took 11 s, 10 s were allowed", seconds=11, limit=10)


def test_a_round_number_that_goes_back_is_found_at_the_hub_and_at_a_site(root):
    edit(root, rounds=evidence(root).history()["rounds"][::-1])
    finds(root, "the history's rounds are [2, 1]")
    journal.note(root / "cache" / "site-1", run="7", round=1, sent="", images=1, applied="")
    finds(root, "site-1 was sent back")


def test_a_round_that_did_not_start_where_the_last_one_ended_is_found(root):
    edit_round(root, 2, started_from="0" * 64)
    finds(root, "round 2 did not start from round 1's adapter")


def test_a_round_that_the_history_does_not_know_is_found(root):
    edit(root, rounds=evidence(root).history()["rounds"][:1])
    finds(root, "the history does not know round-0002")


def test_a_run_that_was_killed_between_a_round_and_its_history_passes(root):
    shutil.rmtree(root / "adapters" / "7" / "final")
    (root / "adapters" / "latest").unlink()
    edit(root, rounds=evidence(root).history()["rounds"][:1], state="running")
    assert check.check(evidence(root, state="finished:failed")) == []


def test_another_adapter_in_a_rounds_folder_is_found(root):
    rewrite(root / "adapters" / "7" / "round-0001" / "adapter_model.safetensors", lambda a: a[min(a)].add_(1))
    finds(root, "round-0001 is not the adapter that the history names")
    finds(root, "away from the mean in float64")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.pop(min(a)), "1 keys too many or too few"),
        (lambda a: a.update({min(a): a[min(a)].reshape(-1)}), " is ("),
        (lambda a: a.update({min(a): a[min(a)].double()}), "torch.float64"),
        (lambda a: a[min(a)].fill_(math.nan), "1 tensors have numbers that are not finite"),
        (lambda a: a[min(a)].add_(1e-3), "the final adapter is not the last round's"),
    ],
)
def test_a_final_adapter_that_is_not_whole_is_found(root, change, said):
    rewrite(root / "adapters" / "7" / "final" / "adapter_model.safetensors", change)
    finds(root, said)


def test_a_mean_with_other_weights_is_found(root):
    entry = evidence(root).history()["rounds"][0]
    entry["sites"]["site-1"]["weight"] -= 1
    edit_round(root, 1, sites=entry["sites"])
    finds(root, "round 1 is not the mean of the accepted replies")


def test_a_weight_above_a_sites_images_is_found(root):
    entry = evidence(root).history()["rounds"][0]
    entry["sites"]["site-1"]["weight"] = 1000
    edit_round(root, 1, sites=entry["sites"])
    finds(root, "site-1 weighs 1000")


def test_an_adapter_that_a_site_never_sent_is_found(root):
    adapters = evidence(root).history()["rounds"][0]["adapters"]
    edit_round(root, 1, adapters=adapters | {"site-1": "0" * 64})
    finds(root, "round 1: site-1 never sent 000000000000")


def test_an_adapter_of_another_round_is_found(root):
    first, second = (entry["adapters"] for entry in evidence(root).history()["rounds"])
    edit_round(root, 2, adapters=second | {"site-1": first["site-1"]})
    finds(root, "round 2: site-1 never sent")


def test_a_sites_copy_that_is_another_adapter_is_found(root):
    sent = evidence(root).history()["rounds"][0]["adapters"]["site-1"]
    rewrite(root / "cache" / "site-1" / "sent" / f"{sent}.safetensors", lambda a: a[min(a)].add_(1))
    finds(root, "is another adapter")


def test_a_latest_that_leads_nowhere_to_another_run_or_is_not_there_is_found(root):
    link = root / "adapters" / "latest"
    link.unlink()
    finds(root, "there is no latest")
    link.symlink_to("6")
    finds(root, "latest is 6, which has no final adapter")
    edit(root, state="failed")
    link.unlink()
    link.symlink_to("7")
    finds(root, "latest is 7, the run's state is 'failed'", state="finished:failed")


@pytest.mark.parametrize("how", ["gone", "another"])
def test_a_lost_adapter_is_found(root, how):
    before = check.adapters(root / "adapters")
    folder = root / "adapters" / "7" / "round-0001"
    if how == "gone":
        shutil.rmtree(folder)
    else:
        rewrite(folder / "adapter_model.safetensors", lambda a: a[min(a)].add_(1))
    finds(root, f"lost: the adapter of 7/round-0001 is {how}", before=before)


def test_the_mean_by_hand():
    one, three = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([5.0, 1.0])}
    assert check.mean([(1, one), (3, three)])["w"].tolist() == [4.0, 2.0]
    assert check.farthest({"w": torch.tensor([4.0, 2.5])}, [(1, one), (3, three)]) == 0.5


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"w": torch.ones(2)}, []),
        ({"w": torch.ones(2) + 1e-3}, ["it is 1.0e-03 away from the honest sites' mean"]),
        ({"w": torch.tensor([1.0, math.inf])}, ["1 tensors have numbers that are not finite"]),
        ({}, ["the adapter has 1 keys too many or too few"]),
        (None, ["no adapter that loads (FileNotFoundError)"]),
    ],
)
def test_a_plain_fedavgs_file_is_judged_by_the_same_questions(saved, said, tmp_path):
    if saved is not None:
        save_file(saved, tmp_path / "adapter.safetensors")
    honest = {"w": torch.ones(2)}
    assert check.check_stock(tmp_path / "adapter.safetensors", honest, honest) == said


@pytest.mark.slow
def test_a_run_that_went_on_from_another_passes(tmp_path, monkeypatch):
    monkeypatch.setenv("BOUQUET_KEEP_SENT", "1")
    cut = Federation(tmp_path, rounds=3, sample_prompts="")
    cut.grid.tamper = spoil_from("2")
    cut.fails(monkeypatch, "HUB-02")
    assert check.check(evidence(tmp_path, state="finished:failed")) == []
    cut.grid.tamper = lambda site, number, reply: reply
    cut.run_config["resume"] = "latest"
    cut.go(monkeypatch, run_id=8)
    caches = evidence(tmp_path).sites
    assert check.check(check.Evidence(tmp_path / "adapters" / "8", caches, tiny.models())) == []
    assert os.readlink(tmp_path / "adapters" / "latest") == "8" and volume.written_rounds(
        tmp_path / "adapters" / "8"
    ) == [1, 2, 3]
