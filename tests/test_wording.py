"""Which of its captions a photo is trained on, with which word in front and in which order: a run's config decides."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open

from app import families, model
from app.adapter import formats
from app.errors import ConfigError
from app.families import sd
from app.hub.history import Provenance
from app.site import cache, diffusion, train
from app.site.photos import data
from app.site.photos.views import Plan
from app.site.photos.wording import Wording, orders, triggered
from bouquet.adapter import card
from tests.kit import families as kit
from tests.kit import tiny

CPU = torch.device("cpu")
TAGS = "rose, red, petals, thorns"


# --- the trigger word -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red rose", "zwx, a red rose"),
        ("a photo of zwx flower", "a photo of zwx flower"),
        ("ZWX, a rose", "ZWX, a rose"),
        ("zwxy rose", "zwx, zwxy rose"),
    ],
)
def test_the_trigger_word_comes_in_front_unless_it_is_there_as_a_word(caption, expected):
    assert triggered(caption, "zwx") == expected
    assert Wording.of(tiny.config(trigger_word=" zwx ")).texts([caption]) == ((expected,),)


def test_a_trigger_word_is_text_and_no_pattern():
    assert triggered("a rose", "(zwx.*") == "(zwx.*, a rose" and triggered("(zwx.* rose", "(zwx.*") == "(zwx.* rose"


def test_a_run_without_wishes_trains_on_captions_as_they_are():
    assert Wording.of(tiny.CONFIG) == Wording() and Wording().texts([TAGS, "b"]) == ((TAGS,), ("b",))


def test_files_and_card_name_the_trigger_word_and_only_where_there_is_one(tmp_path):
    def made(config) -> tuple[dict[str, str], str]:
        formats.write_kohya(tmp_path, tiny.adapter(1), config, sd.FAMILY)
        with safe_open(tmp_path / formats.KOHYA, "pt") as file:
            return file.metadata(), card.card("a/b", config, Provenance(), [("a red poppy", "p.png")], "mit", "")

    notes, text = made(tiny.config(trigger_word="zwx"))
    assert notes["modelspec.trigger_phrase"] == "zwx" and "instance_prompt: zwx" in text and "| trigger word |" in text
    notes, text = made(tiny.CONFIG)
    assert "modelspec.trigger_phrase" not in notes and "instance_prompt: a red poppy" in text
    assert "trigger word" not in text


# --- the order of tags ------------------------------------------------------------------------------------------------


def test_orders_are_distinct_have_the_same_tags_and_begin_with_the_one_as_written():
    found = orders(TAGS, 0, 8)
    assert found[0] == TAGS and len(set(found)) == 8
    assert {tuple(sorted(order.split(", "))) for order in found} == {("petals", "red", "rose", "thorns")}


def test_the_first_tags_stay_and_the_others_take_every_place():
    found = orders(TAGS, 1, 64)
    assert len(found) == math.factorial(3) and all(order.startswith("rose, ") for order in found)
    assert {order.split(", ")[1] for order in found} == {"red", "petals", "thorns"}


@pytest.mark.parametrize(
    ("caption", "keep", "count"),
    [("a rose", 0, 1), ("a,b", 0, 2), ("a, a, b", 0, 3), ("a, a, a", 0, 1), (TAGS, 3, 1), (TAGS, 9, 1), (TAGS, 0, 24)],
)
def test_a_caption_has_no_more_orders_than_its_tags_allow(caption, keep, count):
    assert len(orders(caption, keep, 24)) == count


def test_a_tag_is_first_as_often_as_another():
    """Of 24 tags in 2,000 captions each is first in 7 of 8 shuffled orders about 583 times: 5 deviations are 119."""
    first = Counter(
        order.split(", ")[0].partition(" ")[0]
        for n in range(2000)
        for order in orders(", ".join(f"t{tag} {n}" for tag in range(24)), 0, 8)[1:]
    )
    assert len(first) == 24 and all(abs(count - 2000 * 7 / 24) < 119 for count in first.values())


def test_orders_follow_from_the_caption_alone_and_the_trigger_word_stays_in_front():
    config = tiny.config(caption_shuffle=True, caption_variants=4, trigger_word="zwx")
    (found,) = Wording.of(config).texts([TAGS])
    assert found == tuple(f"zwx, {order}" for order in orders(TAGS, 0, 4)) and len(found) == 4


def test_tags_that_stay_where_nothing_is_shuffled_are_a_contradiction():
    from app.config import RunConfig

    with pytest.raises(ConfigError, match="CONFIG-02") as caught:
        RunConfig.read({"keep-tokens": 2})
    assert "caption-shuffle=true" in caught.value.fix
    assert RunConfig.read({"keep-tokens": 2, "caption-shuffle": True}).keep_tokens == 2


# --- one of them each time --------------------------------------------------------------------------------------------


def site(folder: Path, said: dict[int, list[str] | str]) -> Path:
    """Six pictures, those captions in place of theirs."""
    tiny.site(folder, count=6)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, text in said.items():
        rows[number]["text"] = text
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def encoded(folder: Path, kept: Path, config=tiny.CONFIG) -> tuple[data.Partition, cache.Encoded]:
    sums = model.fingerprint(tiny.base())
    partition, rows = cache.encode(data.scan(folder), tiny.base(), sums, Plan.square(16), kept, CPU, Wording.of(config))
    return partition, rows(partition.photos)


def drawn(photos: cache.Encoded, number: int, times: int = 3000) -> Counter[int]:
    pick = torch.tensor([number] * times)
    return Counter(photos.words(pick, torch.Generator().manual_seed(0)).tolist())


def test_each_caption_is_drawn_as_often_as_another_whatever_orders_it_has(tmp_path):
    """Three captions, of 1, 2 and 4 orders: each a third of 3,000 draws (26 is a deviation), its orders evenly."""
    folder = site(tmp_path / "data", {0: ["one", "a, b", TAGS]})
    _, photos = encoded(folder, tmp_path, tiny.config(caption_shuffle=True, caption_variants=4))
    (one,), two, four = photos.choices[0]
    count = drawn(photos, 0)
    assert set(count) == {one, *two, *four} and abs(count[one] - 1000) < 130
    assert all(abs(count[at] - 500) < 110 for at in two) and all(abs(count[at] - 250) < 80 for at in four)


def test_the_same_caption_is_encoded_once_and_what_is_drawn_is_what_the_encoder_says(tmp_path):
    folder = site(tmp_path / "data", {0: ["one", "two"], 1: ["two", "one"], 2: "one"})
    partition, photos = encoded(folder, tmp_path)
    texts = {"", *(caption for photo in partition.photos for caption in photo.captions)}
    assert len(photos.texts) == len(texts) == 6  # nothing, one, two, and the three that the other pictures share
    (first,), (second,) = photos.choices[0]
    assert photos.choices[1] == [[second], [first]] and photos.text_N[:3].tolist() == [first, second, first]
    parts = {part: model.load(tiny.base(), part) for part in sd.FAMILY.words}
    with torch.no_grad():
        direct = sd.FAMILY.text(parts, ["one", "two"], 24)
    for number, row in ((first, direct[0]), (second, direct[1])):
        torch.testing.assert_close(photos.texts[number]["text"].float(), row["text"], rtol=1e-3, atol=1e-3)


def test_photos_of_one_caption_draw_nothing_and_validation_has_the_first_always(tmp_path):
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    _, plain = encoded(site(tmp_path / "plain", {0: "one"}), tmp_path / "a")
    assert plain.choices == [] and torch.equal(plain.words(torch.arange(6), generator), plain.text_N)
    assert torch.equal(generator.get_state(), before)
    _, photos = encoded(site(tmp_path / "several", {0: ["one", "two", "three"]}), tmp_path / "b")
    objective, unet = diffusion.Objective.of(tiny.base()), tiny.unet().eval()
    losses = [
        diffusion.validation_loss(unet, objective, some, CPU, timesteps=2, batch_size=4) for some in (plain, photos)
    ]
    assert losses[0] == losses[1]


def test_training_draws_captions_by_its_seed_and_a_round_again_is_the_same(tmp_path, monkeypatch):
    """The first pass against draws by hand: a third of [0, 1) for each of a photo's three captions."""
    _, photos = encoded(site(tmp_path / "data", {n: [f"a {n}", f"b {n}", f"c {n}"] for n in range(6)}), tmp_path)
    seen: list[list[int]] = []
    batch = cache.Encoded.batch
    monkeypatch.setattr(cache.Encoded, "batch", lambda own, *what: seen.append(what[2].tolist()) or batch(own, *what))
    config, objective = tiny.config(local_steps=2), diffusion.Objective.of(tiny.base())

    def fit(seed: int) -> model.Adapter:
        unet = tiny.unet()
        train.fit(unet, objective, photos, config, train.accelerator(config), seed)
        return model.adapter_of(unet)

    first, again, other = fit(1), fit(1), fit(2)
    assert tiny.equal(first, again) and not tiny.equal(first, other)
    assert seen[:2] == seen[2:4] != seen[4:]
    draw = torch.Generator().manual_seed(1)
    pick, _ = torch.randperm(6, generator=draw)[:4].tolist(), torch.rand(4, generator=draw)
    thirds = (3 * torch.rand(4, generator=draw, dtype=torch.float64)).long().tolist()
    assert seen[0] == [photos.choices[photo][third][0] for photo, third in zip(pick, thirds, strict=True)]
    assert len(set(thirds)) > 1


def test_captions_cut_are_counted_with_the_trigger_word_and_once_for_all_their_orders(tmp_path):
    fits = ", ".join(["rose"] * 11)  # with its beginning and end 23 of 24 tokens
    folder = site(tmp_path / "data", {0: [fits, f"{fits}, red, pink", "b"], 1: f"{fits}, red"})
    for config, cut in ((tiny.CONFIG, 2), (tiny.config(trigger_word="zwx"), 3)):
        partition, _ = encoded(folder, tmp_path / str(cut), config)
        assert (partition.cut, partition.reads) == (cut, 24)
        assert f"{cut} of 8 captions are longer than the 24 tokens" in partition.report()
    config = tiny.config(caption_shuffle=True)
    assert encoded(folder, tmp_path / "shuffled", config)[0].cut == 2
    assert cache.counted(data.scan(folder), tiny.base(), Wording.of(config)).cut == 2


def with_the_templates_words(parts: dict[str, Any]) -> dict[str, Any]:
    """Qwen-Image's parts, whose pipeline counts on 34 tokens before the caption: the words of its template are a token
    each, as its own tokenizer has them.
    """
    words = parts["tokenizer"]
    inner = (
        "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
    )
    before = ["system", "Describe", "user", *(f" {word}" for word in inner.split())]
    words.add_tokens(before)
    parts["text_encoder"].resize_token_embeddings(len(words))
    template = QwenImagePipeline(None, None, None, words, None).prompt_template_encode
    assert len(words(template.partition("{}")[0]).input_ids) == 34
    return parts


@pytest.mark.parametrize("name", ["zimage", "flux2", "qwen-image"])
def test_a_language_models_caption_counts_as_cut_from_the_first_letter_that_it_does_not_read(name):
    """The family's own encoder is the reference: of the longest caption that fits, it hears the last letter, and of a
    longer one not what is added. A letter is a token here.
    """
    base = kit.base(name)
    family, tokens = families.of(base), families.of(base).tokens(base)
    parts = {part: model.load(base, part) for part in family.words}
    parts = with_the_templates_words(parts) if name == "qwen-image" else parts
    room = family.room(parts[family.reader], tokens)
    longest = "a" * room
    with torch.no_grad():
        fits, longer, other = (
            row["text"][:tokens] for row in family.text(parts, [longest, longest + "b", longest[:-1] + "b"], tokens)
        )
    assert torch.equal(fits, longer) and not torch.allclose(fits, other)
    assert cache._too_long([longest, longest + "b"], parts[family.reader], room) == [longest + "b"]
