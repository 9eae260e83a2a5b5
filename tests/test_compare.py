"""models/mini/compare, the README's table: a federation in one process is the hub's own; what a cell says, by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from app import model
from app.adapter import store
from app.site import train
from benchmarks import pages
from bouquet import worth
from bouquet.adapter import personal
from bouquet.data import classes
from models.mini import compare, draw, learned
from models.mini.compare import CONTENDERS, FEDERATED, Comparison, Row
from tests.kit import tiny


@pytest.fixture
def comparison(finished, tmp_path) -> Comparison:
    """Of the run of two rounds at two sites, on the tiny base, with no judge."""
    federation, run = finished
    folders = [federation.root / "data" / name for name in ("site-1", "site-2")]
    return Comparison(folders, {42: run}, tiny.CONFIG, tmp_path, 0, tiny.models())


# --- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_federation_in_one_process_ends_with_the_adapter_that_the_hub_wrote_bit_for_bit(comparison, finished):
    by_the_hub = store.read_adapter(finished[1] / "final")
    assert tiny.equal(replace(comparison, runs={}).train(FEDERATED, 42), by_the_hub)
    assert tiny.equal(comparison.adapter(FEDERATED, 42), by_the_hub)  # which is taken as it is


def test_a_site_alone_takes_the_runs_steps_and_pooled_all_steps_both_sites_on_the_photos_that_none_holds_out(
    comparison, monkeypatch
):
    steps = []

    def counted(net, objective, encoded, config, accelerator, seed, number, prior):
        steps.append((number, len(encoded.keys), config.rounds))

    monkeypatch.setattr(train, "fit", counted)
    sites = comparison.sites(comparison.config, comparison.folders)
    alike = [len(site.train.keys) for site in sites]
    comparison.train("site 2 alone", 42)
    assert steps == [(1, alike[1], 2), (2, alike[1], 2)]
    steps.clear()
    comparison.train("pooled, same steps", 42)
    assert [number for number, _, _ in steps] == [1, 2]
    steps.clear()
    comparison.train("pooled, all steps", 42)
    assert [(number, rounds) for number, _, rounds in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    [pooled] = comparison.sites(comparison.config, [comparison.pool()])
    assert not pooled.privacy.private and steps[0][1] == len(pooled.train.keys) == sum(alike)
    assert {*pooled.held_out.keys} == {key for site in sites for key in site.held_out.keys}


@pytest.mark.parametrize("strategy", ["alternate", "fedadam"])
def test_who_trains_by_itself_leaves_no_half_to_others_and_asks_no_servers_optimiser(comparison, strategy):
    run = replace(comparison.config, strategy=strategy)
    assert tiny.equal(replace(comparison, config=run).train("site 1 alone", 42), comparison.train("site 1 alone", 42))


def test_a_contender_with_class_images_has_those_that_the_base_model_draws_once_beside_the_same_photos(
    comparison, monkeypatch
):
    monkeypatch.setattr(compare, "CLASSES", 3)
    told = comparison.told("federated, prior-loss-weight=1.0", 42)
    sites, plain = comparison.sites(told, comparison.folders), comparison.sites(comparison.of(42), comparison.folders)
    assert [site.folder.name for site in sites] == ["site-1", "site-2"] and not any(
        site.privacy.private for site in sites
    )
    assert [site.train.keys for site in sites] == [site.train.keys for site in plain]
    assert sites[0].prior.keys == sites[1].prior.keys and len(sites[0].prior.keys) == 3 and plain[0].prior is None
    lines = (sites[0].folder / "class-images/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"].split()[2].rstrip(",") for line in lines] == ["allium", "daisy", "rose"]
    monkeypatch.setattr(classes, "draw", lambda *_: pytest.fail("drawn again"))
    assert comparison.sites(told, comparison.folders)[1].prior.keys == sites[1].prior.keys


def test_what_was_trained_and_measured_is_not_done_again(comparison, monkeypatch):
    made = []

    def row(self, contender, seed, drawn):
        assert drawn is ((contender, seed) != ("base", 43))  # whose pictures are those of 42
        made.append((contender, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return Row(contender, seed, 0.1, [0.1, 0.1], {}, 0)

    monkeypatch.setattr(Comparison, "row", row)
    with pytest.raises(KeyboardInterrupt):
        compare.rows_of(comparison, [42, 43])
    rows = compare.rows_of(comparison, [42, 43])
    assert made[3:] == [(name, 42) for name in CONTENDERS[2:]] + [(name, 43) for name in CONTENDERS]
    assert [(r.contender, r.seed) for r in rows[:3]] == [(name, 42) for name in CONTENDERS[:3]] and len(rows) == 12
    kept = tiny.adapter(3)
    monkeypatch.setattr(Comparison, "train", lambda *which: kept)
    trained = [("pooled, all steps", 42), (FEDERATED, 43)]  # the run given is of seed 42
    assert all(tiny.equal(comparison.adapter(*which), kept) for which in trained)
    monkeypatch.setattr(Comparison, "train", None)
    assert all(tiny.equal(comparison.adapter(*which), kept) for which in trained)


def test_a_row_has_the_loss_that_each_site_measures_and_the_bases_is_of_no_adapter(comparison, monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "HELD_OUT", 2)
    base, federated = (comparison.row(name, 42) for name in ("base", FEDERATED))
    config = tiny.CONFIG
    net = tiny.unet()
    folder = learned.write(tmp_path / "sixteen", draw.photos(draw.KNOWN, 16, learned.SEED))
    plain = learned.losses(net, {"known": folder}, config, tiny.base(), tmp_path)["known"]
    assert base.known == plain != federated.known
    sites = comparison.sites(config, comparison.folders)
    assert base.held_out == [site.evaluate() for site in sites]
    for site, loss in zip(sites, federated.held_out, strict=True):
        model.apply_adapter(site.net, store.read_adapter(comparison.runs[42] / "final"))
        assert site.evaluate() == loss


def test_a_personal_adapter_is_the_one_that_the_sites_own_command_writes(comparison, finished, tmp_path):
    federation, run = finished
    name, folder = "site-1", comparison.folders[0]
    done = personal.train(run, name, folder, tiny.models(), federation.root / "cache" / name, tmp_path, env={})
    assert tiny.equal(comparison.adapter("site 1 personal", 42), store.read_adapter(done.folder))


@pytest.mark.slow
def test_the_command_leaves_tables_a_sheet_and_the_numbers_and_trains_nothing_twice(
    finished, tmp_path, monkeypatch, capsys
):
    federation, run = finished
    few = ("base", FEDERATED, "pooled, all steps", "federated, lora-rank=1 rounds=1")
    for name, fewer in (("HELD_OUT", 2), ("DRAWINGS", 2), ("PICTURED", compare.PICTURED[:1])):
        monkeypatch.setattr(compare, name, fewer)
    (page := tmp_path / "page.md").write_text("<!-- comparison -->\n<!-- /comparison -->\n")
    where = ["--out", f"{tmp_path}", "--work", f"{tmp_path / 'work'}", "--docs", f"{page}"]
    asked = ["--run", f"{run}", "--data", f"{federation.root / 'data'}", "--models", f"{tiny.models()}", "--count", "1"]
    asked += ["--contenders", *few]
    compare.main([*asked, *where])
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert told["runs"] == {"42": "7"} and [row["contender"] for row in told["rows"]] == list(few)
    assert all(row["pictures"] == 2 and row["right"].keys() == {*compare.NEW} for row in told["rows"])
    table = page.read_text().splitlines()[1:-1]
    assert (tmp_path / "comparison.md").read_text().splitlines()[: len(table)] == table and len(table) == 6
    with learned.Image.open(tmp_path / "comparison.png") as sheet:
        assert sheet.size[1] > 4 * 128
    [file] = (tmp_path / "work").glob("*/federated-lora-rank=1-rounds=1-42.safetensors")
    assert {value.shape[0] for key, value in compare.load_file(file).items() if "lora_A" in key} == {1}
    trained = capsys.readouterr().out.count("training: ")
    compare.main([*asked, *where])
    assert trained == 2 and "training: " not in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text()) == told


def test_a_contender_that_there_is_not_is_named_before_anything_is_trained(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--run", "nowhere", "--data", "nowhere", "--contenders", "base", "fedrated"])
    assert "'fedrated' is none of base, site 1 alone" in capsys.readouterr().err


# --- what a cell says -------------------------------------------------------------------------------------------------


def test_wilsons_interval_by_hand():
    """None of 48: from 0 to z²/(48 + z²) = 3.8416/51.8416. Half of 48: ½ ± 0.147/1.0800 = 0.1361."""
    assert compare.wilson(0, 48) == pytest.approx((0, 0.0741), abs=1e-4)
    assert compare.wilson(24, 48) == pytest.approx((0.5 - 0.1361, 0.5 + 0.1361), abs=1e-4)
    assert compare.wilson(48, 48)[0] == pytest.approx(1 - 0.0741, abs=1e-4)


def row(
    contender: str, seed: int, known: float, held_out: list[float], right: tuple[int, int, int, int], pictures: int = 48
) -> Row:
    return Row(contender, seed, known, held_out, dict(zip(compare.NEW, right, strict=True)), pictures)


ROWS = [
    row("base", 42, 0.10, [0.2, 0.4], (0, 0, 0, 0)),
    row("site 1 alone", 42, 0.11, [0.1, 0.4], (24, 24, 0, 0)),
    row("base", 43, 0.10, [0.24, 0.44], (0, 0, 0, 0), 0),
    row("federated", 42, 0.104, [0.11, 0.2], (48, 0, 24, 24)),
    row("federated", 43, 0.106, [0.12, 0.22], (24, 24, 48, 48)),
]


def test_the_table_has_losses_beside_the_bases_and_the_judge_with_its_interval_and_the_seeds():
    """Each seed holds out other photos, so that its losses are beside its own base's: 0.12 of 0.24, 0.22 of 0.44.

    Of lily and poppy together the first seed has 48 of 96, the second too; of lotus and thistle 48 and 96 of 96.
    """
    lines = compare.table(ROWS).splitlines()
    assert lines[2] == "| base | 0.1000 | 0% [0, 4] | 0% [0, 4] | 0.2200 | 0.4200 |"
    assert lines[3] == "| site 1 alone | +10 % | 50% [40, 60] | 0% [0, 4] | -50 % | +0 % |"
    share = ", ".join(["50% [43, 57]", "50 to 50"]), ", ".join(["75% [68, 81]", "50 to 100"])
    losses = "-48 %, -50 to -45", "-50 %, -50 to -50"
    assert lines[4] == f"| federated | +5 %, +4 to +6 | {share[0]} | {share[1]} | {losses[0]} | {losses[1]} |"
    assert len(lines) == 5 and compare.by_species(ROWS).splitlines()[4].startswith(
        "| federated | 75% [65, 83], 50 to 100"
    )


def test_a_table_goes_between_its_pages_marks_and_into_no_page_without_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- loss -->\nold\n<!-- /loss -->\nafter\n")
    pages.write(page, "loss", "| new |\n")
    assert page.read_text() == "before\n<!-- loss -->\n| new |\n<!-- /loss -->\nafter\n"
    with pytest.raises(AssertionError, match="has no <!-- gain -->"):
        pages.write(page, "gain", "| new |\n")


def test_the_judge_sees_what_is_drawn_and_the_count_is_of_the_species_asked_for(monkeypatch):
    """Drawings in place of a model's pictures: two lilies and a rose, asked for as lilies."""
    pictures = [draw.photos((name,), 1, n)[0][0] for n, name in enumerate(("lily", "lily", "rose"))]
    monkeypatch.setattr(learned.sample, "render", lambda *which, seed: pictures)
    assert learned.right(None, None, tiny.CONFIG, 3, ["lily", "rose"]) == {"lily": 2, "rose": 1}
    assert learned.right(None, None, tiny.CONFIG, 3, draw.SPECIES)["lily"] / 3 == pytest.approx(2 / 3)
    monkeypatch.setattr(learned.sample, "pipeline", lambda base, config: None)  # the mean of 12: two and one of three
    assert worth.right(tiny.base(), None, tiny.CONFIG, 3) == pytest.approx((2 / 3 + 1 / 3) / 12)


def test_the_pipeline_draws_with_the_net_that_it_is_given():
    net = tiny.unet()
    pipe = learned.pipeline(net, tiny.base())
    with torch.no_grad():
        net.conv_out.weight.zero_()
        net.conv_out.bias.zero_()
    images = [learned.sample.render(pipe, adapter, ["a"], tiny.CONFIG, 1)[0] for adapter in (tiny.adapter(1), None)]
    assert pipe.unet is net and images[0].tobytes() == images[1].tobytes()  # a net that says nothing, whatever it wears
