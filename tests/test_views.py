"""Shapes, crops and mirror images: what is encoded, what is told of it, and how often each photo is drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from app import metrics, model
from app.config import RunConfig
from app.errors import SiteError
from app.site import budget, cache, diffusion, journal, privacy, train
from app.site.limits import Limits
from app.site.photos import data, images, views
from app.site.photos.views import Plan, View
from bouquet.site import estimate
from tests.kit import tiny

CPU = torch.device("cpu")
SHAPES = ((32, 32), (24, 48), (48, 24))


def wide_and_tall(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A site's folder of noise in these sizes (width, height)."""
    folder.mkdir()
    draw, lines = np.random.default_rng(1), []
    for number, (width, height) in enumerate(sizes):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"flower {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def encode(folder: Path, kept: Path, plan: Plan) -> tuple[data.Partition, cache.Encoded]:
    partition, rows = cache.encode(data.scan(folder), tiny.base(), model.fingerprint(tiny.base()), plan, kept, CPU)
    return partition, rows(partition.photos)


def coordinates(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], -1))


def corner(pixels: torch.Tensor) -> tuple[int, int]:
    """(column, row) of the photo that is in the picture's corner, where nothing was scaled."""
    return tuple(round((value + 1) * 127.5) for value in pixels[:2, 0, 0].tolist())


# --- one view


def test_the_usual_view_is_the_centre_square_bit_for_bit_with_the_frame_that_sdxl_is_told():
    image = coordinates(30, 17)
    assert torch.equal(View(16, 16).pixels(image, "key"), images.to_pixels(image, 16))
    # 17 of 30 columns from the 6th on, 16/17 as large
    assert View(16, 16).frame((30, 17), "key") == (17, 30, 0, round(6 * 16 / 17), 16, 16)


def test_a_view_is_the_largest_box_of_its_shape_by_hand():
    assert View(24, 48).box((100, 40), "key") == (10, 0, 80, 40)
    assert View(24, 48).box((40, 100), "key") == (0, 40, 40, 20)
    assert View(24, 48).frame((100, 40), "key") == (40, 100, 0, 6, 24, 48)
    assert View(48, 24).frame((40, 200), "key") == (200, 40, round(60 * 48 / 80), 0, 48, 24)


def test_a_mirrored_view_is_the_mirror_image_and_its_frame_is_the_mirror_images():
    """Podell et al. tell the net of the picture that it is shown, which is the mirrored one."""
    image = coordinates(21, 16)
    plain, mirrored = View(16, 16).pixels(image, "k"), View(16, 16, mirrored=True).pixels(image, "k")
    assert corner(plain) == (2, 0) and corner(mirrored) == (20 - 2, 0)
    assert View(16, 16, mirrored=True).frame((21, 16), "k") == (16, 21, 0, 2, 16, 16)


def test_a_crop_shows_the_place_that_its_frame_names_and_is_the_same_every_time():
    image, found = coordinates(200, 16), set()
    for crop in range(1, 9):
        view = View(16, 16, crop)
        left, top = corner(view.pixels(image, "key"))
        assert view.frame((200, 16), "key") == (16, 200, top, left, 16, 16) and view == View(16, 16, crop)
        assert torch.equal(view.pixels(image, "key"), View(16, 16, crop).pixels(image, "key"))
        found.add(left)
    assert len(found) > 5 and max(found) <= 200 - 16
    assert {View(16, 16, 1).box((200, 16), key)[0] for key in "abc"} != {View(16, 16, 1).box((200, 16), "a")[0]}


def test_crops_are_drawn_evenly_along_the_photo():
    lefts = [View(16, 16, 1).box((25, 16), f"photo {number}")[0] for number in range(5000)]
    assert sorted(set(lefts)) == list(range(10))
    assert all(abs(count - 500) < 100 for count in Counter(lefts).values())


# --- shapes


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 8), (1024, 16), (768, 16)])
def test_shapes_are_multiples_of_about_as_many_pixels_as_the_square(resolution, multiple):
    found = views.buckets(resolution, multiple)
    assert found[0] == (resolution, resolution) and len(found) == len(set(found)) == 11
    assert all(side % multiple == 0 for shape in found for side in shape)
    assert all(abs(height * width / resolution**2 - 1) < 0.03 for height, width in found)
    run = RunConfig(resolution=resolution, aspect_buckets=True)
    assert views.largest(run, multiple) == max(found, key=lambda shape: shape[0] * shape[1])
    assert views.largest(RunConfig(resolution=resolution), multiple) == (resolution, resolution)


def test_a_photo_goes_to_the_shape_that_is_nearest_to_its_own():
    near = lambda width, height: views.nearest((width, height), views.buckets(512, 8))  # noqa: E731
    assert near(4000, 3000) == (440, 592) and near(3000, 4000) == (592, 440)
    assert near(999, 1000) == (512, 512) and near(9000, 1000) == (360, 728)  # at most 2:1, by diffusers' shapes


def test_a_shape_of_fewer_photos_than_a_step_must_have_is_given_up_and_held_out_photos_keep_theirs():
    sizes = {f"wide {n}": (200, 100) for n in range(4)} | {"tall": (100, 200), "square": (100, 100), "held": (100, 200)}
    plan = Plan(SHAPES, trained=frozenset(sizes) - {"held"}, least=4)
    assert {key: found[0].shape for key, found in plan.views(list(sizes), sizes.get).items()} == {
        key: (48, 24) if key == "held" else (24, 48) for key in sizes
    }
    alone = Plan(SHAPES, trained=frozenset(sizes) - {"held"}, least=5).views(list(sizes), sizes.get)
    assert {found[0].shape for key, found in alone.items() if key != "held"} == {(32, 32)}


def test_only_trained_photos_are_cropped_and_mirrored_and_only_where_there_is_something_to_choose():
    plan = Plan(SHAPES, crops=2, flip=True, trained=frozenset({"long", "exact"}))
    sizes = {"long": (300, 100), "exact": (64, 32), "held": (300, 100)}
    found = plan.views(list(sizes), sizes.get)
    assert [(view.crop, view.mirrored) for view in found["long"]] == [(1, False), (1, True), (2, False), (2, True)]
    assert [(view.crop, view.mirrored) for view in found["exact"]] == [(0, False), (0, True)]
    assert found["held"] == (View(24, 48),)


# --- encoded and kept


def test_each_view_is_encoded_once_and_comes_back_bit_for_bit_in_its_own_shape(tmp_path, monkeypatch):
    folder = wide_and_tall(tmp_path / "data", [(100, 40), (40, 100), (64, 64), (20, 20)])
    keys = [photo.key for photo in data.scan(folder).photos]
    plan = Plan(SHAPES, crops=2, flip=True, trained=frozenset(keys[:3]))
    partition, first = encode(folder, tmp_path / "cache", plan)
    assert partition.enlarged == 1 and "1 photos are smaller than what is trained on" in partition.report()
    assert first.bounds.tolist() == [0, 4, 8, 10, 11]  # two crops of what has room for them, each mirrored
    assert [tuple(z.shape) for z in first.latents] == [(4, 12, 24)] * 4 + [(4, 24, 12)] * 4 + [(4, 16, 16)] * 3
    assert [bucket.tolist() for bucket in first.buckets] == [[0], [1], [2, 3]]
    direct = model.load(tiny.base(), "vae")
    image, view = partition.photos[0].read(), View(24, 48, 2, mirrored=True)
    with torch.no_grad():
        z = direct.encode(view.pixels(image, keys[0])[None]).latent_dist.mean[0] * 0.5
    torch.testing.assert_close(first.latents[3], z, rtol=1e-4, atol=1e-5)
    assert first.sizes_R6[3].tolist() == list(view.frame(image.size, keys[0]))
    monkeypatch.setattr(cache, "_encode_photos", None)
    monkeypatch.setattr(cache, "upright", None)  # not a byte of a photo is read for its size either
    _, again = encode(folder, tmp_path / "cache", plan)
    assert all(torch.equal(one, other) for one, other in zip(first.latents, again.latents, strict=True))


def test_runs_with_and_without_views_keep_files_of_their_own(tmp_path):
    folder = wide_and_tall(tmp_path / "data", [(64, 32)] * 3)
    keys = frozenset(photo.key for photo in data.scan(folder).photos)
    for plan in (Plan.square(32), Plan(SHAPES), Plan(SHAPES[:1], crops=2, trained=keys), Plan(SHAPES[:1], flip=True)):
        encode(folder, tmp_path / "cache", plan)
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 4


def test_a_photos_size_by_its_header_is_that_of_the_photo_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    found = (tmp_path / "a.jpg").read_bytes()
    assert images.upright(found) == images.rgb(found).size == (20, 30)


# --- drawn


def encoded(counts: list[int], each: int = 1) -> cache.Encoded:
    """Buckets of so many photos, of `each` views; a view's latents are all its row's number."""
    total, rows = sum(counts), []
    for number, count in enumerate(counts):
        rows += [torch.full((4, 4 + 2 * number, 8), float(len(rows) + n)) for n in range(each * count)]
    texts = [{"text": torch.zeros(24, 16)} for _ in range(total + 1)]
    bounds = each * torch.arange(total + 1) if each > 1 else None
    sizes = torch.arange(each * total)[:, None].expand(-1, 6)
    keys = [f"photo {n}" for n in range(total)]
    return cache.Encoded(rows, texts, torch.arange(total) + 1, sizes, keys, bounds=bounds)


@pytest.mark.parametrize("counts", [[5, 1], [9, 3, 2], [1, 1, 1]])
def test_a_batch_is_of_one_shape_and_after_as_many_as_photos_each_photo_was_drawn_as_often(counts):
    photos, taken = encoded(counts), Counter()
    batches = train.in_buckets(photos.buckets, 4, torch.Generator().manual_seed(3))
    for _ in range(2 * sum(counts)):
        pick = next(batches)
        rows, _ = photos.batch(pick)  # which stacks them
        assert len(rows) == 4
        taken.update(pick.tolist())
    assert set(taken.values()) == {8} and len(taken) == sum(counts)


def test_every_photo_is_as_likely_in_the_first_batch_however_small_its_bucket():
    buckets = encoded([9, 3, 1]).buckets
    taken = Counter()
    for seed in range(2000):
        taken.update(next(train.in_buckets(buckets, 2, torch.Generator().manual_seed(seed))).tolist())
    assert all(abs(taken[photo] / 4000 - 1 / 13) < 0.02 for photo in range(13))


def test_one_shape_is_drawn_as_ever_bit_for_bit():
    one, other = (torch.Generator().manual_seed(5) for _ in range(2))
    ever, now = train._batches(7, 3, one), train.in_buckets([torch.arange(7)], 3, other)
    assert all(torch.equal(next(ever), next(now)) for _ in range(9)) and torch.equal(one.get_state(), other.get_state())


def test_a_photos_views_are_drawn_alike_and_validation_takes_the_first():
    photos, pick = encoded([3], each=4), torch.tensor([0, 2] * 500)
    rows, given = photos.batch(pick, generator=torch.Generator().manual_seed(1))
    seen = Counter(rows[:, 0, 0, 0].int().tolist())
    assert sorted(seen) == [0, 1, 2, 3, 8, 9, 10, 11] and all(80 < count < 180 for count in seen.values())
    assert torch.equal(rows[:, 0, 0, 0].long(), given["size"][:, 0])  # each with its own sizes
    assert photos.batch(pick[:2])[0][:, 0, 0, 0].tolist() == [0.0, 8.0]


def test_validation_over_shapes_is_the_mean_of_every_photos_own_loss():
    net, objective, photos = tiny.unet().eval(), diffusion.Objective.of(tiny.base()), encoded([2, 1])
    whole = diffusion.validation_loss(net, objective, photos, CPU, timesteps=2, batch_size=8)
    alone = [
        diffusion.validation_loss(
            net, objective,
            SimpleNamespace(buckets=[torch.tensor([0])], keys=[key], batch=lambda pick, n=n: photos.batch(pick + n)),
            CPU, timesteps=2, batch_size=8,
        )
        for n, key in enumerate(photos.keys)
    ]  # fmt: skip
    assert whole == pytest.approx(sum(alone) / 3, rel=1e-5)


# --- a site


def test_a_site_trains_in_shapes_crops_and_mirror_images_and_a_resumed_round_is_the_same(tmp_path):
    folder = wide_and_tall(tmp_path / "data", [(100, 40), (40, 100)] * 6)
    run = tiny.config(resolution=32, aspect_buckets=True, random_crops=2, flip=True, local_steps=8)

    def site() -> train.Site:
        found = train.Site(run, tiny.models(), folder, tmp_path / "cache", "", secret=train.privacy.Secret.NONE)
        found.fit(seed=4)
        return found

    first, again = site(), site()
    assert len(first.train.buckets) == 2 and len(first.train.keys) == len(first.photos)
    assert first.train.bounds.diff().tolist() == [4] * len(first.photos) and first.held_out.bounds is None
    assert 0 < first.evaluate() == again.evaluate()
    assert tiny.equal(model.adapter_of(first.net), model.adapter_of(again.net))


def test_a_site_whose_photos_may_not_be_mirrored_says_so():
    refused = Limits.read("no-flip max-local-steps=100").private()
    refused.check(RunConfig())
    with pytest.raises(SiteError, match="TRUST-03") as error:
        refused.check(RunConfig(flip=True))
    assert "no-flip" in error.value.found


def test_with_buckets_a_round_of_private_photos_needs_as_many_passes_as_photos():
    """Eight passes are led by eight photos; seven may be all of one shape's seven."""
    rules, run = Limits().private(), RunConfig(aspect_buckets=True, local_steps=8)
    rules.check_photos(run, trained=100, held_out=8)
    with pytest.raises(SiteError, match="TRUST-03"):
        rules.check_photos(RunConfig(aspect_buckets=True, local_steps=7), trained=100, held_out=8)


@pytest.mark.slow
def test_the_estimate_counts_the_largest_shape_and_every_view():
    run = {"resolution": 64, "aspect_buckets": True}
    shape = views.largest(tiny.config(**run), 8)
    assert shape[0] * shape[1] > 64 * 64
    of = lambda on_gpu, **more: estimate.estimate(tiny.base(), tiny.config(**more), half=False, on_gpu=on_gpu, photos=9)  # noqa: E731
    assert of(True, **run).peak > of(True, resolution=64).peak
    more = of(False, resolution=16, flip=True, random_crops=3).floor - of(False, resolution=16).floor
    assert more == 9 * 5 * 4 * 4 * 8 * 8  # five views more, float32 latents of 16² pixels


def test_how_many_photos_were_enlarged_is_a_number_of_the_reply_and_a_word_of_the_sites_own_journal():
    assert metrics.sane({"enlarged": 3}) == ({"enlarged": 3}, 0)
    entry = {"round": 1, "time": 0, "applied": "a" * 8, "sent": "b" * 8, "images": 9, "enlarged": 3}
    assert journal.words(entry).endswith("trained on 9 photos and sent adapter bbbbbbbb, 3 of its photos enlarged")


# --- what one photo changes -------------------------------------------------------------------------------------------


def test_one_photo_more_changes_no_other_photos_shape_or_crop(tmp_path):
    """A fourth wide photo is what a shape needs where photos are private (min-step-images). With a promise that three
    others were trained on in another shape would be seven clips of change, of which one is paid.
    """
    wide, square = (64, 32), (32, 32)
    sizes, rows = [square] * 20 + [wide] * 4, []
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / privacy.FILE).write_text("07" * 32 + "\n")
    for name, count in (("without", 23), ("with", 24)):
        folder = tmp_path / name
        folder.mkdir()
        for number, size in enumerate(sizes[:count]):
            noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text("a rose")
        run = tiny.config(resolution=32, aspect_buckets=True, local_steps=30, validation_fraction=0.02)
        how = {"secret": privacy.Secret.KEPT, "promise": budget.Promise.read("epsilon=8 photos=24")}
        encoded = train.Site(run, tiny.models(), folder, tmp_path / "cache", "", **how).train
        rows.append({key: encoded.batch(torch.tensor([n]))[0][0] for n, key in enumerate(encoded.keys)})
    without, more = rows
    assert len(more.keys() - without.keys()) <= 1 and len(without) > 15
    assert {tuple(row.shape) for row in without.values()} == {(4, 16, 16), (4, 12, 24)}
    assert all(torch.allclose(row, more[key], atol=1e-4) for key, row in without.items() if key in more)
