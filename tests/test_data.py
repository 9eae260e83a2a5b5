"""What a site's folder may hold, what is set aside and counted, and what never leaves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from app.errors import SiteError
from app.site.photos.data import pixels, scan
from app.site.photos.images import MAX_BYTES, REASONS, BadImage, check, rgb, to_pixels
from bouquet import ROOT

SHARED = ROOT.parent / "shared" / "data"


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def flat(colour, size=(8, 8), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def noise(size=(64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def declared_png(width: int, height: int) -> bytes:
    """A well-formed PNG that declares a size, with next to no pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def imagefolder(folder: Path, rows: dict[str, str], extra: dict[str, bytes] | None = None) -> Path:
    """One distinct flat picture for each name and caption, and more files listed with a caption of their own."""
    for number, name in enumerate(rows):
        put(folder, name, encoded(flat((number, 40, 80))))
    for name, data in (extra or {}).items():
        put(folder, name, data)
    listed = rows | dict.fromkeys(extra or {}, "an extra")
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in listed.items()]
    put(folder, "metadata.jsonl", "\n".join(lines).encode())
    return folder


TWO = {"0001.png": "a red poppy, blue background", "0002.png": "a white lily, night background"}


def refused(folder: Path, code: str, **options) -> SiteError:
    with pytest.raises(SiteError) as caught:
        scan(folder, **options)
    assert caught.value.code == code
    assert str(folder) not in str(caught.value)  # str() goes to the hub
    return caught.value


# --- layouts -------------------------------------------------------------------------------------------------------


def test_an_imagefolder_gives_each_picture_its_own_caption(tmp_path):
    partition = scan(imagefolder(tmp_path, TWO))
    assert [photo.caption for photo in partition.photos] == list(TWO.values())
    assert partition.counts == {"images": 2}


def test_the_key_is_the_sha256_of_the_files_bytes(tmp_path):
    first = scan(imagefolder(tmp_path, TWO)).photos[0]
    assert first.key == hashlib.sha256((tmp_path / "0001.png").read_bytes()).hexdigest()


def test_captions_lose_line_breaks_and_double_spaces(tmp_path):
    folder = imagefolder(tmp_path, {"a.png": " a  red\npoppy ", "b.png": "a lily"})
    assert scan(folder).photos[0].caption == "a red poppy"


def test_a_list_of_captions_may_lie_in_a_subfolder_and_call_its_column_caption(tmp_path):
    for number in (1, 2):
        put(tmp_path, f"train/{number}.png", encoded(flat(number)))
    lines = '{"file_name": "1.png", "caption": "one"}\n\n{"file_name": "2.png", "caption": "two"}\n'
    put(tmp_path, "train/metadata.jsonl", lines.encode())
    assert [photo.caption for photo in scan(tmp_path).photos] == ["one", "two"]


def test_a_bare_folder_takes_its_captions_from_caption_txt_and_the_subfolder_names(tmp_path):
    put(tmp_path, "moon_orchid/1.jpg", encoded(flat(1), "JPEG"))
    put(tmp_path, "globe-flower/2.webp", encoded(flat(2), "WEBP"))
    put(tmp_path, "caption.txt", b"a photo of a {label}, botanical garden\n")
    captions = {photo.caption for photo in scan(tmp_path).photos}
    assert captions == {"a photo of a moon orchid, botanical garden", "a photo of a globe-flower, botanical garden"}


def test_one_caption_for_all_needs_no_subfolders(tmp_path):
    for number in (1, 2):
        put(tmp_path, f"{number}.png", encoded(flat(number)))
    assert [p.caption for p in scan(tmp_path, caption_template="a pressed flower").photos] == ["a pressed flower"] * 2


def hub_table(count: int = 3, *, names=("pink primrose", "tiger_lily"), labels=(0, 1, -1), **columns) -> pa.Table:
    """The schema that the hub gives an image data set: struct of bytes and path, ClassLabel names in the metadata."""
    images = [{"bytes": encoded(flat((i, 9, 9))), "path": f"image_{i}.png"} for i in range(count)]
    data = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        data["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table(data | {name: pa.array(values) for name, values in columns.items()})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_a_hub_tables_class_names_become_captions_and_an_unlabelled_row_is_counted(tmp_path):
    pq.write_table(hub_table(), tmp_path / "train.parquet")
    partition = scan(tmp_path)
    assert [p.caption for p in partition.photos] == ["a photo of a pink primrose", "a photo of a tiger lily"]
    assert partition.counts == {"images": 2, "no-caption": 1}


def test_a_tables_text_column_wins_over_its_labels(tmp_path):
    pq.write_table(hub_table(text=["one", "two", "three"]), tmp_path / "train.parquet")
    assert [photo.caption for photo in scan(tmp_path).photos] == ["one", "two", "three"]


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_of_both_formats_are_read(tmp_path, writer):
    table = hub_table()
    with writer(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=1)
    photo = scan(tmp_path).photos[1]
    assert photo.caption == "a photo of a tiger lily" and photo.read().getpixel((0, 0)) == (1, 9, 9)


def test_a_table_may_keep_its_pictures_in_files_but_not_outside_the_folder(tmp_path):
    put(tmp_path / "site", "pictures/1.png", encoded(flat(1)))
    put(tmp_path / "site", "pictures/2.png", encoded(flat(2)))
    put(tmp_path, "private.png", encoded(flat(3)))
    paths = ["pictures/1.png", "pictures/2.png", "../private.png"]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": path} for path in paths], struct_type)
    pq.write_table(pa.table({"image": images, "text": ["one", "two", "three"]}), tmp_path / "site" / "data.parquet")
    partition = scan(tmp_path / "site")
    assert [photo.caption for photo in partition.photos] == ["one", "two"]
    assert partition.counts == {"images": 2, "outside": 1}


def test_pictures_read_in_order_unpack_each_row_group_once(tmp_path, monkeypatch):
    pq.write_table(hub_table(6, labels=[0] * 6), tmp_path / "train.parquet", row_group_size=2)
    begun, begin = [], pq.ParquetFile.iter_batches
    counted = lambda *args, **named: begun.extend(named["row_groups"]) or begin(*args, **named)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    partition = scan(tmp_path)
    assert begun == [0, 1, 2]  # each picture was read here too, for its hash
    assert [photo.read().getpixel((0, 0))[0] for photo in partition.photos] == [0, 1, 2, 3, 4, 5]
    assert begun == [0, 1, 2] * 2
    assert [photo.read().getpixel((0, 0))[0] for photo in partition.photos[::-1]] == [5, 4, 3, 2, 1, 0]


# --- what is set aside -----------------------------------------------------------------------------------------------

JPEG = encoded(noise(), "JPEG")
ANIMATION = {"save_all": True, "append_images": [flat(200)]}
SET_ASIDE = {
    "empty.png": (b"", "empty"),
    "notes.png": (b"dear colleague, ...", "format"),
    "scan.gif": (encoded(flat(1), "GIF"), "format"),
    "renamed.png": (encoded(flat(1), "BMP"), "format"),
    "bomb.png": (declared_png(20_000, 20_000), "too-large"),
    "big.png": (declared_png(7_072, 7_072), "too-large"),  # 50,013,184 pixels
    "animated.webp": (encoded(flat(1), "WEBP", **ANIMATION), "animated"),
    "animated.png": (encoded(flat(1), "PNG", **ANIMATION), "animated"),
    "header.jpg": (JPEG[:100], "undecodable"),
    "half.webp": (encoded(noise(), "WEBP")[:200], "undecodable"),
}


@pytest.mark.parametrize("name", SET_ASIDE)
def test_a_scan_sets_a_bad_picture_aside_and_goes_on_with_the_rest(tmp_path, name):
    data, reason = SET_ASIDE[name]
    partition = scan(imagefolder(tmp_path, TWO, {name: data}))
    assert partition.counts == {"images": 2, reason: 1}
    assert partition.quarantined == ((name, reason),)


def test_a_picture_of_fifty_megapixels_is_still_allowed():
    check(declared_png(7_071, 7_071))  # 49,999,041


def test_a_file_too_large_to_read_is_not_read(tmp_path):
    imagefolder(tmp_path, TWO)
    with put(tmp_path, "huge.png", b"").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room on disk
    assert scan(tmp_path).counts == {"images": 2, "too-large": 1}


def test_a_link_or_path_that_leaves_the_folder_is_not_followed(tmp_path):
    outside = put(tmp_path, "private/secret.png", encoded(flat(7)))
    site = imagefolder(tmp_path / "site", TWO, {"../private/secret.png": outside.read_bytes()})
    (site / "link.png").symlink_to(outside)
    (site / "linked_folder").symlink_to(outside.parent)
    partition = scan(site, caption_template="a {label}")
    assert partition.counts == {"images": 2, "outside": 3}


def test_a_link_within_the_folder_is_the_same_picture_again(tmp_path):
    (imagefolder(tmp_path, TWO) / "link.png").symlink_to("0001.png")
    assert scan(tmp_path, caption_template="a flower").counts == {"images": 2, "duplicate": 1}


ABSENT, UNREADABLE = ("gone.png", "null\0.png"), ("folder.png", "pipe.png", "loop.png")


@pytest.mark.parametrize("name", ABSENT + UNREADABLE)
def test_a_listed_name_that_is_no_readable_file_is_counted(tmp_path, name):
    imagefolder(tmp_path, TWO)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "loop.png").symlink_to("loop.png")
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": name, "text": "a rose"}))
    reason = "absent" if name in ABSENT else "unreadable"
    assert (name.replace("\0", "\ufffd"), reason) in scan(tmp_path).quarantined


def test_hidden_files_are_no_pictures_and_counted(tmp_path):
    imagefolder(tmp_path, TWO)
    put(tmp_path, "._0001.png", b"what a Mac leaves on a USB stick")
    put(tmp_path, ".thumbnails/1.png", encoded(flat(77)))
    assert scan(tmp_path, caption_template="a flower").counts == {"images": 2, "system": 2}


def test_pictures_that_no_list_names_are_counted_as_without_caption(tmp_path):
    put(imagefolder(tmp_path, TWO), "new.png", encoded(flat(99)))
    assert scan(tmp_path).counts == {"images": 2, "no-caption": 1}


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [JPEG[: len(JPEG) // 2], encoded(noise())[:2000], declared_png(64, 64)])
def test_pixels_cut_off_pass_the_scan_and_are_set_aside_when_read(tmp_path, data):
    partition = scan(imagefolder(tmp_path, TWO, {"cut.png": data}))
    bad = {}
    for photo in partition.photos:
        try:
            photo.read()
        except BadImage as error:
            bad[photo.key] = error.reason
    assert bad == {hashlib.sha256(data).hexdigest(): "undecodable"}
    rest = partition.without(bad).require(2)
    assert rest.counts == {"images": 2, "undecodable": 1} and rest.quarantined == (("cut.png", "undecodable"),)


def test_a_file_that_changes_after_the_scan_is_not_passed_off_as_the_old_one(tmp_path):
    photo = scan(imagefolder(tmp_path, TWO)).photos[0]
    put(tmp_path, "0001.png", encoded(flat(250)))
    with pytest.raises(BadImage, match="^changed$"):
        photo.read()
    (tmp_path / "0001.png").unlink()
    with pytest.raises(BadImage, match="^unreadable$"):
        photo.read()


GREY_16 = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
PALETTE = flat((200, 100, 50)).quantize(4)
CONVERTED = {  # name: encoded picture, its colour as RGB, worked out by hand
    "grey": (encoded(flat(77, mode="L")), (77, 77, 77)),
    "16-bit grey": (encoded(GREY_16), (128, 128, 128)),  # 33023 / 257 = 128.49
    "bilevel": (encoded(flat(1, mode="1")), (255, 255, 255)),
    "palette": (encoded(PALETTE), (200, 100, 50)),
    "clear": (encoded(flat((255, 0, 0, 0), mode="RGBA")), (255, 255, 255)),  # nothing of the red remains
    "half clear": (encoded(flat((0, 0, 0, 51), mode="RGBA")), (204, 204, 204)),  # 255 · (1 − 51/255)
    "grey, half clear": (encoded(flat((0, 51), mode="LA")), (204, 204, 204)),
    "cmyk": (encoded(flat((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100), (255, 0, 0)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_every_colour_mode_becomes_the_right_rgb(name):
    data, colour = CONVERTED[name]
    image = rgb(data)
    assert image.mode == "RGB" and image.getpixel((4, 4)) == pytest.approx(colour, abs=1)


def test_16_bit_grey_is_scaled_so_that_white_stays_white_and_every_8_bit_tone_comes_back():
    """257 · 255 = 65535; a tone between two goes to the nearer one, where the upper byte alone is the lower one."""
    grey = np.array(
        [[257 * 0, 257 * 1, 257 * 127, 257 * 254, 65535], [128, 129, 0x80FF, 65407, 65406]], dtype=np.uint16
    )
    # 129 / 257 = 0.502, 65407 / 257 = 254.502, 65406 / 257 = 254.498
    want = [[0, 1, 127, 254, 255], [0, 1, 128, 255, 254]]
    assert np.asarray(rgb(encoded(Image.fromarray(grey))))[:, :, 0].tolist() == want


def with_chunks(image: Image.Image, gamma: float, *primaries: float, srgb: bool = False) -> bytes:
    """A PNG that says its gamma, and its white's, red's, green's and blue's places."""
    told = PngImagePlugin.PngInfo()
    told.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    if primaries:
        told.add(b"cHRM", struct.pack(">8I", *(round(100_000 * place) for place in primaries)))
    if srgb:
        told.add(b"sRGB", b"\0")
    return encoded(image, pnginfo=told)


P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)  # a phone's and a Mac's screen
BT709 = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # sRGB's own
SAID = {  # name: a PNG without a profile, its colour in sRGB, worked out by hand
    # 255 · (1.055 · (128 / 255)^(1 / 2.4) − 0.055) = 187.8
    "linear": (with_chunks(flat((128, 64, 3)), 1.0), (188, 137, 28)),
    "linear grey": (with_chunks(flat(128, mode="L"), 1.0), (188, 188, 188)),
    "linear 16-bit grey": (with_chunks(Image.fromarray(np.full((8, 8), 0x8080, np.uint16)), 1.0), (188, 188, 188)),
    "linear, clear": (with_chunks(flat((128, 64, 3, 0), mode="RGBA"), 1.0), (255, 255, 255)),
    "an old Mac's": (with_chunks(flat((128, 128, 128)), 1 / 1.8), (146, 146, 146)),  # (128 / 255)^1.8 = 0.2892
    # R 1.2249 · 0.5776 − 0.2247 · 0.1274 = 0.6788
    "a wide gamut": (with_chunks(flat((200, 100, 100)), 1 / 2.2, *P3), (215, 93, 97)),
    "the usual, dark": (with_chunks(flat((12, 9, 3)), 1 / 2.2, *BT709), (12, 9, 3)),  # a pure power would make 4 of 12
    "the usual with sRGB's word": (with_chunks(flat((128, 64, 3)), 1.0, srgb=True), (128, 64, 3)),  # which counts more
    "none": (with_chunks(flat((128, 64, 3)), 0.0), (128, 64, 3)),
    "a mistake": (with_chunks(flat((128, 64, 3)), 22_000.0), (128, 64, 3)),
    "no primaries": (with_chunks(flat((128, 64, 3)), 1.0, *[0.0] * 8), (128, 64, 3)),
    "primaries on one line": (with_chunks(flat((128, 64, 3)), 1.0, *[0.3] * 8), (128, 64, 3)),
    "primaries beyond all": (with_chunks(flat((128, 64, 3)), 1.0, *[42_000.0] * 8), (128, 64, 3)),
}


@pytest.mark.parametrize("name", SAID)
def test_a_png_without_a_profile_is_read_by_its_gamma_and_primaries(name):
    data, colour = SAID[name]
    assert rgb(data).getpixel((4, 4)) == pytest.approx(colour, abs=1 if "usual" not in name else 0)


def test_a_profile_counts_more_than_gamma():
    told = PngImagePlugin.PngInfo()
    told.add(b"gAMA", struct.pack(">I", 100_000))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert rgb(encoded(flat((128, 64, 3)), pnginfo=told, icc_profile=profile)).getpixel((4, 4)) == (128, 64, 3)


def test_a_phones_jpeg_with_a_preview_is_a_photo_not_an_animation():
    data = encoded(flat((10, 20, 30)), "MPO", save_all=True, append_images=[flat(0)])
    assert rgb(data).getpixel((0, 0)) == pytest.approx((10, 20, 30), abs=2)


def test_a_damaged_exif_block_does_not_spoil_the_pixels():
    assert rgb(encoded(flat(9), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x01")).size == (8, 8)


def test_the_exif_orientation_turns_the_picture_upright():
    image = flat((0, 0, 0), (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: turn 90° clockwise, so the top left corner goes to the top right
    upright = rgb(encoded(image, exif=exif))
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)


def test_the_centre_square_is_cut_out_and_mapped_to_minus_one_and_one():
    columns = np.array([[10, 0, 255, 20]] * 2, dtype=np.uint8)  # 4×2: the centre square is columns 1 and 2
    image = Image.fromarray(np.stack([columns] * 3, axis=-1))
    tensor = to_pixels(image, 2)
    assert tensor.shape == (3, 2, 2) and str(tensor.dtype) == "torch.float32"
    assert tensor.tolist() == [[[-1.0, 1.0], [-1.0, 1.0]]] * 3


def test_scaling_matches_cropping_first_and_stays_within_minus_one_and_one(tmp_path):
    put(tmp_path, "a.png", encoded(noise((90, 61))))
    put(tmp_path, "b.png", encoded(flat(3)))
    photo = scan(tmp_path, caption_template="noise").photos[0]
    tensor = pixels(photo, 32)
    cropped = photo.read().crop((14, 0, 75, 61)).resize((32, 32), Image.Resampling.LANCZOS)
    expected = np.asarray(cropped).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(tensor.numpy() - expected).max() < 1e-6
    assert -1 <= tensor.min() < tensor.max() <= 1


def test_a_photo_can_be_sent_to_a_loading_process(tmp_path):
    photo = scan(imagefolder(tmp_path, TWO)).photos[1]
    assert pickle.loads(pickle.dumps(photo)).read().getpixel((0, 0)) == (1, 40, 80)


# --- mistakes with a name --------------------------------------------------------------------------------------------


def test_an_empty_folder_is_told_where_to_set_another(tmp_path):
    put(tmp_path, "readme.txt", b"pictures to come")
    error = refused(tmp_path, "SITE-01")
    assert str(tmp_path) in error.found and ".env" in error.fix


def test_one_picture_is_too_few_and_the_error_says_how_many_are_needed(tmp_path):
    error = refused(imagefolder(tmp_path, {"1.png": "a rose"}), "SITE-02", min_images=5)
    assert "1 usable" in error.found and "5 are needed" in error.found


def test_pictures_set_aside_later_can_leave_too_few(tmp_path):
    partition = scan(imagefolder(tmp_path, TWO))
    with pytest.raises(SiteError, match="^SITE-02"):
        partition.without({partition.photos[0].key: "undecodable"}).require(2)


def test_a_missing_folder_and_a_file_in_its_place_are_named(tmp_path):
    assert "does not exist" in refused(tmp_path / "typo", "SITE-03").found
    assert "not a folder" in refused(put(tmp_path, "file", b""), "SITE-03").found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take on another user id")
def test_a_folder_closed_to_the_containers_user_is_named_with_the_user_id():
    script = "import os, sys, app.site.photos.data, pathlib; os.setuid(65534)\n"
    script += (
        "try: app.site.photos.data.scan(pathlib.Path(sys.argv[1]))\nexcept app.site.photos.data.SiteError as error:"
        " print(error.report())"
    )
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, whose parents are closed as well
        Path(folder).chmod(0o700)
        command = [sys.executable, "-c", script, folder]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith("SITE-03") and "user id 65534" in out


def test_pictures_without_any_caption_are_told_both_ways_to_add_them(tmp_path):
    for number in range(3):
        put(tmp_path, f"{number}.png", encoded(flat(number)))
    error = refused(tmp_path, "SITE-04")
    assert "metadata.jsonl" in error.fix and "caption.txt" in error.fix


@pytest.mark.parametrize("text", [b"", b" \n", b"a {lable}", b"\xff\xfe"])
def test_a_caption_template_that_cannot_be_meant_is_refused(tmp_path, text):
    put(imagefolder(tmp_path, TWO), "caption.txt", text)
    assert "{label}" in refused(tmp_path, "SITE-05").fix


@pytest.mark.parametrize("line", [b"{not json", b'{"text": "no name"}', b"[1, 2]", b'{"file_name": 3}', b"\xff"])
def test_a_list_of_captions_that_cannot_be_read_names_the_line(tmp_path, line):
    put(tmp_path, "a.png", encoded(flat(1)))
    put(tmp_path, "metadata.jsonl", b'{"file_name": "a.png", "text": "one"}\n' + line)
    error = refused(tmp_path, "SITE-06")
    assert "metadata.jsonl" in error.found and ("line 2" in error.found or "utf-8" in error.found)


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_a_damaged_table_is_named(tmp_path, name):
    put(tmp_path, name, b"PAR1 but then nothing")
    assert name in refused(tmp_path, "SITE-07").found


def test_a_table_without_pictures_says_which_columns_it_has(tmp_path):
    pq.write_table(pa.table({"petals": [5], "label": ["rose"]}), tmp_path / "data.parquet")
    assert "no image column among petals, label" in refused(tmp_path, "SITE-01").found


# --- what never leaves -----------------------------------------------------------------------------------------------


def test_nothing_that_may_be_sent_names_a_file_a_caption_or_a_path(tmp_path):
    private = {"patient_smith.png": "Ms Smith's orchid", "patient_jones.png": "Mr Jones's lily"}
    partition = scan(imagefolder(tmp_path / "clinic", private, {"patient_doe.png": b""}))
    sendable = f"{partition!r} {partition.photos!r} {partition.counts} {BadImage('empty')}"
    with pytest.raises(SiteError) as caught:
        partition.require(9)
    for secret in ("smith", "jones", "doe", "orchid", "lily", "clinic", str(tmp_path)):
        assert secret not in (sendable + str(caught.value)).lower()
    assert "patient_doe.png" in partition.report()  # the site's own log says which


def test_every_count_that_may_be_sent_is_one_of_the_documented_reasons(tmp_path):
    partition = scan(imagefolder(tmp_path, TWO, {name: data for name, (data, _) in SET_ASIDE.items()}))
    assert set(partition.counts) - {"images"} <= set(REASONS)
    assert partition.counts == {
        "images": 2, "animated": 2, "empty": 1, "format": 3, "too-large": 2, "undecodable": 2,
    }  # fmt: skip


def test_a_long_quarantine_is_cut_short_in_the_log(tmp_path):
    partition = scan(imagefolder(tmp_path, TWO, {f"{n}.png": b"" for n in range(30)}))
    assert partition.report().splitlines()[-1] == "  and 10 more"


def test_importing_the_data_module_loads_neither_torch_nor_datasets_nor_pyarrow():
    script = (
        "import sys, app.site.photos.data; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real photos are not on this machine (../shared/data)")
def test_the_real_flower_photos_are_read_from_the_hubs_parquet():
    partition = scan(SHARED / "oxford-flowers-512-sample")
    assert partition.counts == {"images": 204}
    assert len({photo.caption for photo in partition.photos}) == 102  # 2 photos a class
    assert "a photo of a pink primrose" in {photo.caption for photo in partition.photos}
    assert pixels(partition.photos[0], 64).shape == (3, 64, 64)
