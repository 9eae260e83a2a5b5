"""bouquet data partition: what each site's folder gets, and that nothing is mixed, lost or fetched."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app.site.photos.data import scan
from app.site.photos.images import REASONS
from bouquet import ROOT, cli
from models.mini.draw import UNSEEN, site_photos

SHARED = ROOT.parent / "shared" / "data"
CLASSES = ("pink primrose", "tiger lily", "globe-flower", "corn_poppy")
NO_NETWORK = """
import os, socket, sys
socket.socket.connect = socket.getaddrinfo = lambda *a, **k: os._exit(99)
from bouquet import cli
sys.exit(cli.main(["data", "partition", *sys.argv[1:]]))
"""


def partition(*args, code: int = 0) -> str:
    """Call the command where a connection ends in an error and is told; its output."""
    asked, told = [], io.StringIO()

    def refuse(*address: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    with (
        mock.patch("socket.socket.connect", refuse),
        mock.patch("socket.getaddrinfo", refuse),
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(told),
    ):
        ended = cli.main(["data", "partition", *map(str, args)])
    assert (ended, asked) == (code, []), told.getvalue()
    return told.getvalue()


def listed(site: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (site / "metadata.jsonl").read_text().splitlines()]
    return {row["file_name"]: row["text"] for row in rows}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}


def jpeg_or_png(number: int) -> bytes:
    out = io.BytesIO()
    picture = np.full((12, 12, 3), number, dtype=np.uint8)
    Image.fromarray(picture).save(out, "JPEG" if number % 2 else "PNG")
    return out.getvalue()


def data_set(folder: Path, pictures: list[bytes], **columns) -> Path:
    """A data set as Hugging Face stores it: parquet under data/, image struct, ClassLabel names in the schema's
    metadata.
    """
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": data, "path": None} for data in pictures], struct)
    features = {"image": {"_type": "Image"}}
    for name, values in columns.items():
        kind = {"names": list(CLASSES), "_type": "ClassLabel"} if isinstance(values[0], int) else None
        features[name] = kind or {"dtype": "string", "_type": "Value"}
    table = pa.table({"image": images} | columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def flowers(tmp_path_factory) -> Path:
    """80 pictures sorted by class, 20 a class."""
    pictures = [jpeg_or_png(number) for number in range(80)]
    return data_set(tmp_path_factory.mktemp("flowers"), pictures, label=[number // 20 for number in range(80)])


# --- mini ------------------------------------------------------------------------------------------------------------


def test_mini_gives_every_site_the_flowers_drawn_for_it(tmp_path):
    out = partition("--sites", 2, "--images-per-site", 10, "--seed", 5, "--out", tmp_path)
    for site in (1, 2):
        photos = scan(tmp_path / f"site-{site}").photos
        drawn = site_photos(site, 10, 5)
        assert [photo.caption for photo in photos] == [caption for _, caption in drawn]
        assert all(np.array_equal(photo.read(), image) for photo, (image, _) in zip(photos, drawn, strict=True))
        assert [sum(species in photo.caption for photo in photos) for species in UNSEEN[site]] == [4, 4]  # of 10
        assert not any(species in photo.caption for photo in photos for species in UNSEEN[3 - site])
        assert f"site-{site}       10 images" in out
    assert out.splitlines()[-1].startswith("next")


def test_the_same_command_again_finds_nothing_to_do(tmp_path):
    partition("--images-per-site", 3, "--out", tmp_path)
    before = contents(tmp_path)
    assert "nothing to do" in partition("--images-per-site", 3, "--out", tmp_path)
    assert contents(tmp_path) == before


def test_a_third_mini_site_joins_without_touching_the_other_two(tmp_path):
    partition("--images-per-site", 3, "--out", tmp_path)
    before = contents(tmp_path)
    partition("--images-per-site", 3, "--out", tmp_path, "--sites", 3)
    after = contents(tmp_path)
    assert before.items() < after.items() and scan(tmp_path / "site-3").counts == {"images": 3}


@pytest.mark.parametrize("change", ["settings", "foreign", "lost"])
def test_other_content_is_refused_with_its_reason_and_left_alone(tmp_path, change):
    site, seed = tmp_path / "site-1", 0
    if change == "foreign":
        site.mkdir()
        (site / "holiday.png").write_bytes(b"mine")
    else:
        partition("--sites", 1, "--images-per-site", 3, "--out", tmp_path)
    if change == "settings":
        seed = 1
    if change == "lost":
        (site / "0002.png").unlink()
    before = contents(tmp_path)
    out = partition("--sites", 2, "--images-per-site", 3, "--out", tmp_path, "--seed", seed, code=1)
    reasons = {"settings": "other settings: seed", "foreign": "not made by", "lost": "2 files for 3 images"}
    assert out.startswith("SITE-09") and reasons[change] in out and f"rm -r {site}" in out
    assert contents(tmp_path) == before  # site-2 was not made either


def test_what_a_killed_run_left_behind_is_made_anew(tmp_path):
    half = tmp_path / ".site-1.partial"
    half.mkdir()
    (half / "0001.png").write_bytes(b"half a fl")
    partition("--sites", 1, "--images-per-site", 3, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["site-1"]
    assert scan(tmp_path / "site-1").counts == {"images": 3}


# --- data sets -------------------------------------------------------------------------------------------------------


def test_every_picture_goes_to_one_site_with_its_bytes_and_class_name(tmp_path, flowers):
    partition("--dataset", flowers, "--sites", 3, "--out", tmp_path)
    original = {jpeg_or_png(number): CLASSES[number // 20].replace("_", " ") for number in range(80)}
    found = Counter()
    for site in (1, 2, 3):
        captions = listed(tmp_path / f"site-{site}")
        assert sorted(captions)[0].startswith("0001.") and len(captions) in (26, 27)
        for name, caption in captions.items():
            data = (tmp_path / f"site-{site}" / name).read_bytes()
            assert caption == f"a photo of a {original[data]}"
            assert name.endswith(".png" if data.startswith(b"\x89PNG") else ".jpg")
            found[data] += 1
    assert found == dict.fromkeys(original, 1)


def test_sites_are_alike_even_when_the_source_is_sorted_by_class(tmp_path, flowers):
    partition("--dataset", flowers, "--sites", 2, "--out", tmp_path)
    assert all(len(set(listed(tmp_path / f"site-{site}").values())) == 4 for site in (1, 2))


def test_classes_apart_gives_no_class_to_two_sites(tmp_path, flowers):
    partition("--dataset", flowers, "--sites", 3, "--by", "label", "--out", tmp_path)
    classes = [set(listed(tmp_path / f"site-{site}").values()) for site in (1, 2, 3)]
    assert [len(of_site) for of_site in classes] == [2, 1, 1]  # four classes over three sites
    assert len(set.union(*classes)) == 4


def test_dirichlet_skews_the_classes_and_loses_no_picture(tmp_path, flowers):
    partition("--dataset", flowers, "--by", "dirichlet", "--alpha", 0.3, "--seed", 1, "--out", tmp_path)
    counts = [Counter(listed(tmp_path / f"site-{site}").values()) for site in (1, 2)]
    assert sum(counts, Counter()) == {f"a photo of a {name.replace('_', ' ')}": 20 for name in CLASSES}
    assert max(abs(counts[0][caption] - 10) for caption in counts[0]) >= 5


def test_a_template_and_a_limit_are_kept(tmp_path, flowers):
    options = ("--images-per-site", 5, "--caption-template", "{label}, oil on canvas")
    partition("--dataset", flowers, "--out", tmp_path, *options)
    for site in (1, 2):
        captions = listed(tmp_path / f"site-{site}").values()
        assert len(captions) == 5 and all(caption.endswith(", oil on canvas") for caption in captions)


def test_the_text_column_is_the_caption_and_bad_pictures_are_counted(tmp_path):
    pictures = [*(jpeg_or_png(number) for number in range(6)), b"not a picture", b""]
    folder = data_set(tmp_path / "set", pictures, text=[f"flower {number}" for number in range(8)])
    out = partition("--dataset", folder, "--sites", 1, "--out", tmp_path / "out")
    assert sorted(listed(tmp_path / "out" / "site-1").values()) == [f"flower {number}" for number in range(6)]
    assert "6 images" in out and "1 format" in out and "1 empty" in out


@pytest.mark.slow
def test_the_seed_decides_who_gets_what(tmp_path, flowers):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        partition("--dataset", flowers, "--sites", 1, "--images-per-site", 10, "--seed", seed, "--out", tmp_path / name)
    keys = {name: [photo.key for photo in scan(tmp_path / name / "site-1").photos] for name in "abc"}
    assert keys["a"] == keys["b"] != keys["c"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real photos are not on this machine (../shared/data)")
def test_the_real_flower_photos_are_divided_without_the_network(tmp_path):
    out = partition("--dataset", SHARED / "oxford-flowers-128", "--out", tmp_path)
    sites = [scan(tmp_path / f"site-{site}") for site in (1, 2)]
    assert [site.counts for site in sites] == [{"images": 3585}, {"images": 3582}]
    assert "3582 images, 2 duplicate" in out  # 7,169 in train
    assert len({photo.caption for site in sites for photo in site.photos}) == 102


ODD = (  # rows beside four good ones: a picture, a caption, and what a site makes of them
    (jpeg_or_png(10), "", "no-caption"),
    (jpeg_or_png(12), None, "no-caption"),
    (jpeg_or_png(0), "flower 0", "duplicate"),
    (b"", "nothing", "empty"),
    (jpeg_or_png(1)[:60], "half", "undecodable"),
    (b"GIF89a", "another format", "format"),
    (jpeg_or_png(14), "red\u2028rose", "red rose"),
    (jpeg_or_png(16), " a red\n\nrose ", "a red rose"),
    (jpeg_or_png(18), "rose " * 10_000, " ".join(["rose"] * 2000)),
    (jpeg_or_png(20), 'a "rose", red\\', 'a "rose", red\\'),
)


def test_what_is_written_is_what_a_site_reads_of_the_same_rows(tmp_path):
    pictures, texts, said = zip(
        *((jpeg_or_png(number), f"flower {number}", f"flower {number}") for number in range(0, 8, 2)), *ODD, strict=True
    )
    folder = data_set(tmp_path / "set", list(pictures), text=list(texts))
    out = partition("--dataset", folder, "--sites", 1, "--out", tmp_path / "out", "--public")
    direct, written = scan(folder), scan(tmp_path / "out" / "site-1")
    aside = {reason: said.count(reason) for reason in REASONS if reason in said}
    assert direct.counts == {"images": 8} | aside and written.counts == {"images": 8}
    assert {(p.key, p.caption) for p in direct.photos} == {(p.key, p.caption) for p in written.photos}
    assert {p.caption for p in written.photos} == set(said) - REASONS.keys()
    assert "8 images" in out and all(f"{count} {reason}" in out for reason, count in aside.items())
    assert "nothing to do" in partition("--dataset", folder, "--sites", 1, "--out", tmp_path / "out", "--public")


def test_labels_without_names_are_no_captions_here_either_and_several_captions_stay_several(tmp_path):
    pictures = [jpeg_or_png(number) for number in range(4)]
    table = pa.table(
        {
            "image": [{"bytes": data, "path": None} for data in pictures],
            "text": [["one", "two"], ["three"], [], None],
            "label": [0, 1, 2, 3],
        }
    )
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "t.parquet")
    partition("--dataset", tmp_path / "set", "--sites", 1, "--out", tmp_path / "out")
    assert sorted(map(str, listed(tmp_path / "out" / "site-1").values())) == ["['one', 'two']", "three"]
    folders = (tmp_path / "set", tmp_path / "out" / "site-1")
    assert [sorted(p.captions for p in scan(folder).photos) for folder in folders] == [[("one", "two"), ("three",)]] * 2


def test_a_column_of_paths_and_addresses_is_counted_and_nothing_is_fetched(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg_or_png(2))
    (tmp_path / "b.png").write_bytes(jpeg_or_png(4))
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "https://example.org/c.png", str(tmp_path / "gone.png")]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": images, "text": list("abcd")}), tmp_path / "set" / "t.parquet")
    out = partition("--dataset", tmp_path / "set", "--sites", 1, "--out", tmp_path / "out")
    assert (
        sorted(listed(tmp_path / "out" / "site-1").values()) == ["a", "b"] and "1 absent" in out and "1 address" in out
    )


# --- mistakes with a name --------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert partition("--dataset", "./nowhere", "--out", tmp_path, code=1).startswith("SITE-08")


def test_a_hub_name_without_the_network_is_named(tmp_path):
    """In a process of its own, as Hugging Face's library reads its settings once; it dies with 99 when it connects."""
    command = [sys.executable, "-c", NO_NETWORK, "--dataset", "nobody/none", "--out", tmp_path]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    out = done.stdout + done.stderr
    assert done.returncode == 1, out
    assert out.startswith("SITE-08") and "nobody/none" in out


def test_an_unknown_split_says_which_there_are(tmp_path, flowers):
    out = partition("--dataset", flowers, "--split", "dev", "--out", tmp_path, code=1)
    assert out.startswith("SITE-08") and "['train']" in out


def test_a_data_set_without_words_needs_a_caption(tmp_path):
    folder = data_set(tmp_path / "set", [jpeg_or_png(number) for number in range(4)])
    out = partition("--dataset", folder, "--sites", 1, "--out", tmp_path / "out", code=1)
    assert out.startswith("SITE-04") and "--caption-template" in out
    partition("--dataset", folder, "--sites", 1, "--out", tmp_path / "out", "--caption-template", "a flower")
    assert set(listed(tmp_path / "out" / "site-1").values()) == {"a flower"}


def test_classes_apart_without_classes_is_refused(tmp_path):
    folder = data_set(tmp_path / "set", [jpeg_or_png(number) for number in range(4)], text=list("abcd"))
    assert partition("--dataset", folder, "--by", "label", "--out", tmp_path / "out", code=1).startswith("SITE-10")


def test_more_sites_than_pictures_can_fill_is_refused_and_leaves_no_folder(tmp_path):
    folder = data_set(tmp_path / "set", [jpeg_or_png(number) for number in range(3)], text=list("abc"))
    assert partition("--dataset", folder, "--sites", 3, "--out", tmp_path / "out", code=1).startswith("SITE-11")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_placeholder_that_does_not_exist_is_refused(tmp_path, flowers):
    out = partition("--dataset", flowers, "--caption-template", "a {name}", "--out", tmp_path, code=1)
    assert out.startswith("SITE-05") and "{name}" in out
