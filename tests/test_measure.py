"""bouquet measure: numbers about pictures worked out by hand, what is asked for before anything is drawn, and what
leaves a site.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sh
from PIL import Image

from app import bases
from app.adapter import sample
from app.errors import BouquetError
from app.site import cache
from bouquet import cli
from bouquet.adapter import measure, memorised, pictures
from bouquet.report import findings, memorisation
from bouquet.report.memorisation import Distances
from bouquet.report.page import page
from bouquet.report.reading import read
from tests.kit import tiny
from tests.test_worth import run_of


@pytest.fixture(scope="module")
def pipe():
    return sample.pipeline(tiny.base(), tiny.CONFIG, torch.device("cpu"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return tiny.site(tmp_path_factory.mktemp("measure") / "data", 16)


@pytest.fixture
def run(tmp_path):
    """A finished run of the tiny base as bouquet report and bouquet measure find one."""
    folder = run_of(tmp_path, 5)
    told = json.loads((folder / "history.json").read_text())
    (folder / "history.json").write_text(
        json.dumps(told | {"run": "5", "rounds": [], "validation": [], "versions": {}})
    )
    return folder


def column(samples: list[float], held_out: list[float], **more) -> dict:
    return {
        "site": "rose",
        "adapter": "a",
        "space": memorised.SPACE,
        "photos": 12,
        "samples": samples,
        "held_out": held_out,
    } | more


# --- memory
# ------------------------------------------------------------------------------------------------------------------


def test_a_number_is_the_nearest_distance_over_the_mean_of_the_next():
    photos = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    # from (1, 0): 1, 3 and √65; from a photo itself: 0
    assert memorised.numbers(torch.tensor([[1.0, 0.0], [4.0, 0.0]]), photos) == pytest.approx(
        [1 / ((3 + math.sqrt(65)) / 2), 0.0]
    )
    assert memorised.numbers(torch.tensor([[1.0, 0.0]]), photos, neighbours=1) == pytest.approx([1 / 3])


def test_a_copy_of_a_training_photo_is_far_below_every_held_out_photo_also_with_some_noise():
    draw = torch.Generator().manual_seed(0)
    photos, held_out = torch.randn(60, 64, generator=draw), torch.randn(20, 64, generator=draw)
    copies = photos[:3] + 0.2 * torch.randn(3, 64, generator=draw)
    blurred = torch.zeros(3, 64)  # near to everything, a copy of nothing
    samples = memorised.numbers(torch.cat([copies, blurred]), photos)
    ordinary = memorised.numbers(held_out, photos)
    assert memorisation.suspicious(samples, ordinary) == 3 and max(samples[:3]) < 0.3 < min(ordinary) < min(samples[3:])


def test_pictures_are_compared_as_the_cache_encodes_photos(pipe, site, tmp_path):
    from app.site import train

    here = train.Site(tiny.CONFIG, tiny.models(), site, tmp_path / "cache", "")
    photos = here.photos
    images = [Image.open(site / photo.name) for photo in photos]
    # the cache holds float16
    torch.testing.assert_close(
        memorised.latents(pipe, images), here.train.latents_NChw.flatten(1), atol=5e-3, rtol=5e-3
    )
    assert isinstance(here.train, cache.Encoded) and bases.locate("tiny", tiny.models())


@pytest.mark.parametrize(
    ("count", "chance"), [(0, 1.0), (1, 4 / 10), (2, 4 * 3 / (10 * 9)), (4, 4 * 3 * 2 / (10 * 9 * 8 * 7))]
)
def test_the_chance_that_the_smallest_of_all_are_samples(count, chance):
    """4 samples and 6 held-out photos in any order."""
    assert memorisation.chance(4, 6, count) == pytest.approx(chance)


def test_the_chance_is_that_of_shuffling():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(20_000):
        order = rng.permutation(10)
        hits += memorisation.suspicious(order[:4].tolist(), order[4:].tolist()) >= 2
    assert hits / 20_000 == pytest.approx(memorisation.chance(4, 6, 2), abs=0.01)


def test_what_a_site_reads():
    none, luck, grave = (
        memorisation.found("rose", Distances(12, memorised.SPACE, tuple(samples), tuple(held_out)))
        for samples, held_out in (
            ([0.7, 0.9], [0.6, 0.8]), ([0.5, 0.9], [0.6, 0.8]), ([0.1] * 5 + [0.9], [0.6] * 20),
        )
    )  # fmt: skip
    assert (none.suspicious, none.rare) == (0, False) and none.sentence.startswith("None of 2 samples")
    assert (luck.suspicious, luck.chance, luck.rare) == (1, 0.5, False) and luck.sentence.endswith(
        "That is not unusual."
    )
    assert (
        grave.rare
        and "5 of 6 samples are nearer" in grave.sentence
        and grave.sentence.endswith("before the adapter goes out.")
    )


@pytest.mark.slow
def test_measured_at_a_site_only_sorted_distances_leave_and_the_report_shows_them(run, site, tmp_path):
    command = (
        f"scripts/bouquet measure memory rose --data {site} {run} --models {tiny.models()} --count 4 --out"
        f" {tmp_path}/rose.memory.json"
    )
    sh(command, tiny.ROOT)
    told = json.loads((tmp_path / "rose.memory.json").read_text())
    assert set(told) == {"site", "run", "adapter", "space", "seed", "photos", "held_out", "samples", "version"}
    assert (
        len(told["samples"]) == 4
        and told["samples"] == sorted(told["samples"])
        and told["held_out"] == sorted(told["held_out"])
    )
    assert told["photos"] + len(told["held_out"]) == 16 and (told["run"], told["seed"]) == ("run-5", 5)
    shown = sh(f"scripts/bouquet measure collect {run} {tmp_path}/rose.memory.json", tiny.ROOT).stdout
    assert shown.startswith("rose  ") and list(read(run).memory.sites["rose"].samples) == told["samples"]
    text = page(read(run))
    assert "Does it draw the sites" in text and "4 samples" in text and "How near to one training photo, site 1" in text
    assert not any(caption in text for caption in tiny.CAPTIONS[2:])


def test_the_report_warns_of_a_site_whose_photos_come_back(run):
    (run / "memory.json").write_text(json.dumps({"run": "5", "sites": {"rose": column([0.1] * 5 + [0.9], [0.6] * 20)}}))
    [warning] = findings.remembered(read(run))
    assert warning == "The adapter may draw photos of rose: 5 of its samples are too near to one of them."
    text = page(read(run))
    assert "Look</strong>" in text and warning in text
    (run / "memory.json").unlink()
    assert "Not measured. <code>bouquet measure memory</code>" in page(read(run))


@pytest.mark.parametrize(
    "spoil", [{"samples": []}, {"samples": [float("nan")]}, {"held_out": [-1]}, {"held_out": "x"}, {"photos": "<b>"}]
)
def test_distances_of_another_shape_are_refused_by_name_at_the_hub_and_by_the_report(run, tmp_path, spoil):
    (tmp_path / "rose.json").write_text(json.dumps(column([0.5], [0.5]) | spoil))
    with pytest.raises(BouquetError, match="MEASURE-02"):
        measure.collect(run, [tmp_path / "rose.json"])
    (run / "memory.json").write_text(json.dumps({"sites": {"rose": column([0.5], [0.5]) | spoil}}))
    try:
        with pytest.raises(BouquetError, match="MEASURE-02"):
            read(run)
    finally:
        (run / "memory.json").unlink()


def test_columns_of_two_adapters_are_refused(run, tmp_path):
    for name, adapter in (("rose", "a"), ("lily", "b")):
        (tmp_path / f"{name}.json").write_text(json.dumps(column([0.5], [0.5]) | {"site": name, "adapter": adapter}))
    with pytest.raises(BouquetError, match="MEASURE-02"):
        measure.collect(run, [tmp_path / "rose.json", tmp_path / "lily.json"])


# --- pictures
# ------------------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_of_two_pictures_of_a_prompt(pipe, monkeypatch):
    rows = {"a": torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), "b": torch.zeros(2, 2)}
    monkeypatch.setattr(memorised, "latents", lambda _, images: rows[images])
    # a: distances 5, 5 and 10 over √2; b: all alike
    assert pictures.diversity(pipe, ["a", "b"]) == pytest.approx((20 / 3 / math.sqrt(2) + 0) / 2)


def test_the_judge_counts_what_was_asked_for():
    from models.mini import draw

    pairs = draw.photos(("poppy",), 4, 3)
    poppies = [image for image, _ in pairs]
    assert pictures.judged(["a red poppy, meadow background"], [poppies]) >= 0.75
    assert pictures.judged(["a white lily, night background"], [poppies]) <= 0.25
    with pytest.raises(BouquetError, match="MEASURE-01"):
        pictures.judged(["a bicycle"], [poppies])


@pytest.mark.slow
def test_the_numbers_go_into_the_runs_folder_with_prompts_count_and_seeds(run):
    shown = sh(f"scripts/bouquet measure pictures {run} --models {tiny.models()} --count 2", tiny.ROOT).stdout
    told = json.loads((run / "measures.json").read_text())
    assert told["prompts"] == list(tiny.CONFIG.prompts) and (told["count"], told["seeds"]) == (2, [5, 6])
    assert set(told["diversity"]) == {"base", "adapter"} and min(told["diversity"].values()) > 0
    assert "diversity" in shown and "seeds 5 to 6" in shown and "kid" not in told


def test_a_run_without_prompts_is_named_before_a_model_is_looked_for_and_a_prompt_is_measured(
    tmp_path, monkeypatch, capsys
):
    run = run_of(tmp_path, 5, sample_prompts="")
    with monkeypatch.context() as patch:
        patch.setattr(bases, "locate", lambda *_: pytest.fail("the base model was looked for"))
        for asked in (["adapter", "sample", "--adapter"], ["measure", "pictures"]):
            assert cli.main([*asked, str(run), "--models", str(tiny.models())]) == 1
            told = capsys.readouterr().err
            assert told.startswith("EXPORT-11") and "no sample prompts" in told and "--prompt " in told
    assert not (run / "measures.json").exists()
    asked = ["--prompt", "a rose", "--prompt", "a lily | or two", "--count", "2", "--models", str(tiny.models())]
    assert cli.main(["measure", "pictures", str(run), *asked]) == 0
    told = json.loads((run / "measures.json").read_text())
    assert told["prompts"] == ["a rose", "a lily | or two"] and (told["count"], told["seeds"]) == (2, [5, 6])
    assert "2 pictures for each of 2 prompts" in capsys.readouterr().out
    sheet = ["adapter", "sample", "--adapter", str(run), "--prompt", "a rose", "--models", str(tiny.models())]
    assert cli.main([*sheet, "--out", str(tmp_path / "rose.png")]) == 0 and (tmp_path / "rose.png").is_file()


def plain_photos(folder: Path, *greys: int) -> Path:
    """PNG photos of 24×16 pixels without captions, each of one grey."""
    folder.mkdir()
    for grey in greys:
        Image.new("RGB", (24, 16), (grey, grey, grey)).save(folder / f"{grey}.png")
    return folder


def test_photos_need_no_captions_and_those_that_cannot_be_read_are_skipped_and_counted(tmp_path):
    folder = plain_photos(tmp_path / "photos", 10, 20, 200)
    for name in ("20.png", "200.png"):  # of the second the pixels are cut off, of the third the header
        (folder / name).write_bytes((folder / name).read_bytes()[: 50 if name == "20.png" else 12])
    Image.new("RGB", (8, 8), (90, 90, 90)).save(folder / "90.jpg")
    (folder / "copy.png").write_bytes((folder / "10.png").read_bytes())
    (folder / "90.txt").write_text("")
    (folder / "notes.md").write_text("no photo")
    found, skipped = pictures.photos(folder, 16)
    assert [(photo.size, photo.getpixel((8, 8))) for photo in found] == [((16, 16), (g, g, g)) for g in (10, 90)]
    assert skipped == 2


def test_a_damaged_photo_is_known_before_anything_is_drawn_and_told_with_the_numbers(
    run, tmp_path, monkeypatch, capsys
):
    folder = plain_photos(tmp_path / "photos", 10, 20, 200)
    (folder / "200.png").write_bytes((folder / "200.png").read_bytes()[:50])
    order, photos, pairs = [], pictures.photos, measure.pairs
    monkeypatch.setattr(pictures, "need_kid", lambda _: None)
    monkeypatch.setattr(pictures, "kid", lambda drawn, real, *_: {"mean": len(drawn) + 0.5, "std": 0.0})
    monkeypatch.setattr(pictures, "photos", lambda *asked: order.append("read") or photos(*asked))
    monkeypatch.setattr(measure, "pairs", lambda *asked: order.append("drawn") or pairs(*asked))
    asked = ["--photos", str(folder), "--count", "2", "--models", str(tiny.models())]
    assert cli.main(["measure", "pictures", str(run), *asked]) == 0 and order == ["read", "drawn"]
    told = json.loads((run / "measures.json").read_text())["kid"]
    assert (told["base"]["mean"], told["photos"], told["skipped"]) == (4.5, 2, 1)  # of 2 prompts 2 pictures
    assert f"skipped    1 photos of {folder} that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 1])
def test_a_folder_without_two_photos_that_can_be_read_is_refused_before_anything_is_drawn(
    run, tmp_path, monkeypatch, left
):
    folder = plain_photos(tmp_path / "photos", *(10, 20)[:left])
    (folder / "x.jpg").write_bytes(b"\xff\xd8\xff")
    monkeypatch.setattr(pictures, "need_kid", lambda _: None)
    monkeypatch.setattr(sample, "pipeline", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(BouquetError, match="MEASURE-01") as refused:
        measure.measure(run, tiny.models(), measure.Asked(photos=folder))
    assert f"{left} photos that can be read, and 1 that cannot" in refused.value.found


def test_prompts_that_the_judge_does_not_know_are_refused_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(sample, "pipeline", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(BouquetError, match="MEASURE-01"):
        measure.measure(run, tiny.models(), measure.Asked(["a bicycle"], judge=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--photos {data}", "torch_fidelity"),
        ("--photos {data} --kid judge", "torchmetrics"),
        ("--clip {data}", "torchmetrics"),
    ],
)
def test_a_measure_that_cannot_be_taken_is_named_before_anything_is_drawn(
    run, site, monkeypatch, capsys, options, words
):
    found = pictures.find_spec
    monkeypatch.setattr(pictures, "find_spec", lambda name: None if name == words else found("json"))
    monkeypatch.setattr(sample, "pipeline", lambda *_: pytest.fail("something was drawn"))
    assert cli.main(["measure", "pictures", str(run), *options.format(data=site).split()]) == 1
    told = capsys.readouterr().err
    assert told.startswith("MEASURE-01") and words in told


def test_missing_weights_are_named_and_not_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(BouquetError, match="MEASURE-01") as refused:
        pictures.need_kid("inception")
    assert pictures.INCEPTION in refused.value.found and list(tmp_path.iterdir()) == []
    with pytest.raises(BouquetError, match="MEASURE-01"):
        pictures.need_clip(tmp_path)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`:UserWarning")
def test_kid_is_small_for_the_same_flowers_and_large_for_others():
    pytest.importorskip("torchmetrics", reason="KID is torchmetrics', which is not installed")
    from models.mini import draw

    poppies, more, lilies = (
        [image for image, _ in draw.photos((name,), 24, seed)]
        for name, seed in (("poppy", 1), ("poppy", 2), ("lily", 1))
    )
    same, other = (pictures.kid(drawn, poppies, "judge", seed=0) for drawn in (more, lilies))
    assert abs(same["mean"]) < other["mean"] / 10 and same["subset"] == 24
    assert pictures.kid(more, poppies, "judge", seed=0) == same


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_clip_score_is_a_hundred_times_the_cosine_of_picture_and_prompt(tmp_path):
    pytest.importorskip("torchmetrics", reason="CLIP score is torchmetrics', which is not installed")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny.ROOT / "models" / "mini" / "tokenizer")
    words = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words |= {"max_position_embeddings": tokenizer.model_max_length, "eos_token_id": tokenizer.eos_token_id}
    sees = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = CLIPModel(CLIPConfig(text_config=words, vision_config=sees, projection_dim=8)).eval()
    net.save_pretrained(tmp_path)
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer
    )
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    prompt = "a red poppy, meadow background"
    with torch.no_grad():
        out = net(**processor(text=[prompt], images=[image], return_tensors="pt", padding=True))
    cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
    assert cosine > 0.01
    assert pictures.clip([prompt], [[image]], tmp_path) == pytest.approx(100 * cosine, abs=1e-3)
