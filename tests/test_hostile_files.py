"""Files in a data folder that somebody made to break a reader, or that a disk made so: refused by name, at little cost.

Every list is fixed and small. What the readers may raise is a BouquetError, whose code a person can look up, or
BadImage, which is counted; anything else fails the test, as it would end a run with a traceback.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms

from app import model
from app.errors import BouquetError
from app.site import cache
from app.site.photos import images
from app.site.photos.data import scan
from app.site.photos.views import Plan
from bouquet import ROOT
from tests.kit import tiny
from tests.kit.wait import PATIENT

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 100_000
HUGE = "1" + "0" * 5000  # more digits than Python reads
STRANGE_JSON = ["", "null", "3", '"text"', "[]", "[[]]", "{", "\ufeff{}", "NaN", HUGE, DEEP, DEEP_OBJECT, "{}x", "\0"]
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def code_of(call) -> str | None:
    """What a reader refuses it with; None where it does not."""
    try:
        call()
    except BouquetError as error:
        assert error.report()
        return error.code
    return None


def png(colour: int = 0, size: tuple[int, int] = (8, 8), **options) -> bytes:
    out = BytesIO()
    Image.new("RGB", size, (colour, 40, 80)).save(out, "PNG", **options)
    return out.getvalue()


def folder_of_two(folder: Path) -> Path:
    """Two good pictures with captions."""
    folder.mkdir(exist_ok=True)
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(png(number))
    rows = [{"file_name": f"{number}.png", "text": f"flower {number}"} for number in (1, 2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


# --- tables: how much ---

COST = """
import re, sys
from pathlib import Path
import pyarrow.parquet, app.site.photos.data
from app.errors import BouquetError
# not getrusage: its peak is also the one of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
before = peak()
try:
    print(app.site.photos.data.scan(Path(sys.argv[1])).counts, end=" ")
except BouquetError as error:
    print(error.code, end=" ")
print(peak() - before)
"""


def cost(folder: Path) -> tuple[str, int]:
    """What a scan said, and the MiB that it took at most, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", COST, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    said, _, peak = done.stdout.rpartition(" ")
    return said, int(peak)


def repeated(cell: bytes, times: int) -> pa.Array:
    """The same cell many times, without being it in this process."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([cell], pa.binary()))


def one_picture_often(path: Path) -> None:
    table = pa.table({"image": repeated(bytes(50_000_000), 30), "text": ["a rose"] * 30})
    pq.write_table(table, path, compression="zstd", store_schema=False, write_statistics=False)


def one_large_page(path: Path) -> None:
    table = pa.table({"image": pa.array([bytes(1000), bytes(600_000_000)], pa.binary()), "text": ["a rose"] * 2})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)


def the_one_before_once_more(path: Path) -> None:
    table = pa.table({"image": pa.array([bytes(30_000_000)] * 20, pa.binary()), "text": ["a rose"] * 20})
    encoding = {"image": "DELTA_BYTE_ARRAY", "text": "PLAIN"}
    plain = {"use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, compression="zstd", column_encoding=encoding, **plain)


def long_captions(path: Path) -> None:
    table = pa.table(
        {
            "image": pa.array([png(n) for n in range(30)], pa.binary()),
            "text": repeated(b"rose " * 10**7, 30).cast(pa.string()),
        }
    )
    pq.write_table(table, path, compression="zstd", write_statistics=False)


def compressed_batches(path: Path) -> None:
    table = pa.table({"image": pa.array([bytes(50_000_000)] * 12, pa.binary()), "text": ["a rose"] * 12})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(path.with_suffix(".arrow")), table.schema, options=options) as out:
        out.write_table(table)


@pytest.mark.parametrize(
    "write", [one_picture_often, one_large_page, the_one_before_once_more, long_captions, compressed_batches]
)
def test_a_small_table_that_unpacks_to_a_gigabyte_is_refused_within_little_memory(tmp_path, write):
    write(tmp_path / "train.parquet")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_000_000
    said, mebibytes = cost(tmp_path)
    assert said == "SITE-07" and mebibytes < 450


@pytest.mark.slow
def test_more_rows_than_a_file_can_have_photos_are_refused(tmp_path):
    rows = 70_000
    image = pa.StructArray.from_arrays(
        [pa.nulls(rows, pa.binary()), repeated(b"a.png", rows).cast(pa.string())], ["bytes", "path"]
    )
    pq.write_table(pa.table({"image": image}), tmp_path / "train.parquet")
    assert (tmp_path / "train.parquet").stat().st_size < 10_000
    assert code_of(lambda: scan(tmp_path)) == "SITE-07"


def test_a_table_as_datasets_writes_it_takes_about_its_own_size_once(tmp_path):
    rng = torch.Generator().manual_seed(0)
    noise = [
        Image.fromarray(torch.randint(256, (256, 256, 3), generator=rng, dtype=torch.uint8).numpy()) for _ in range(300)
    ]
    cells = []
    for image in noise:
        out = BytesIO()
        image.save(out, "PNG", compress_level=0)
        cells.append({"bytes": out.getvalue(), "path": None})
    pq.write_table(
        pa.table({"image": pa.array(cells, PICTURE), "text": ["a rose"] * 300}),
        tmp_path / "train.parquet",
        row_group_size=100,
    )
    size = (tmp_path / "train.parquet").stat().st_size >> 20
    said, mebibytes = cost(tmp_path)
    assert said == "{'images': 300}" and size == 56 and mebibytes < 100


def test_compressed_batches_that_are_not_much_are_read(tmp_path):
    table = pa.table({"image": pa.array([png(1), png(2)], pa.binary()), "text": ["a rose", "a lily"]})
    with pa.ipc.new_file(
        str(tmp_path / "train.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as out:
        out.write_table(table)
    assert [photo.caption for photo in scan(tmp_path).photos] == ["a rose", "a lily"]


# --- tables: what ---

TWO = pa.array([{"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": "2.png"}], PICTURE)
NOTES = STRANGE_JSON + [
    json.dumps(notes)
    for notes in (
        {"info": None},
        {"info": []},
        {"info": {"features": 3}},
        {"info": {"features": [1]}},
        {"info": {"features": {"label": None}}},
        {
            "info": {
                "features": {"image": {"_type": ["Image"]}, "label": {"_type": "ClassLabel", "names": {"0": "rose"}}}
            }
        },
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": [None, 5, {}]}}}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["\ud800" * 10, "x" * 10**6]}}}},
        {"info": {"features": {"nowhere": {"_type": "Image"}}}},
        {"long": "x" * 5_000_000},
    )
]


@pytest.mark.parametrize("notes", NOTES, ids=range(len(NOTES)))
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_whatever_a_tables_metadata_holds_it_is_read_or_refused_by_name(tmp_path, notes, suffix):
    write_table(
        pa.table({"image": TWO, "label": [0, 1]}).replace_schema_metadata({"huggingface": notes}),
        tmp_path / f"train.{suffix}",
    )
    assert code_of(lambda: scan(tmp_path, caption_template="a {label}")) in (None, "SITE-04", "SITE-07")


def write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table)


COLUMNS = {  # name: columns of two rows, and what is said
    "path as text": ({"image": ["1.png", "2.png"]}, "SITE-01"),
    "number": ({"image": [1, 2]}, "SITE-01"),
    "list": ({"image": [[b"1"], [b"2"]]}, "SITE-01"),
    "null": ({"image": pa.nulls(2)}, "SITE-01"),
    "struct of others": ({"image": [{"bytes": 1, "path": 2}] * 2}, "SITE-01"),
    "struct without bytes": ({"image": [{"path": "1.png"}, {"path": "../2.png"}]}, "SITE-01"),
    "null struct": ({"image": pa.array([None, None], PICTURE)}, "SITE-01"),
    "odd paths": ({"image": pa.array([{"path": "\0"}, {"path": "x" * 5000}], PICTURE)}, "SITE-01"),
    "label of lists": ({"image": TWO, "label": [[1], [2]]}, "SITE-04"),
    "label out of range": ({"image": TWO, "label": pa.array([2**63, 7], pa.uint64())}, "SITE-04"),
    "label as categories": ({"image": TWO, "label": pa.array(["rose", "lily"]).dictionary_encode()}, None),
    "text of numbers": ({"image": TWO, "text": [1.5, 2.5]}, "SITE-04"),
    "text of structs": ({"image": TWO, "text": [{"a": "b"}] * 2}, "SITE-04"),
    "large types": (
        {"image": pa.array([png(1), png(2)], pa.large_binary()), "text": pa.array(["a", "b"], pa.large_string())},
        None,
    ),
}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_type_is_read_or_refused_by_name(tmp_path, name, suffix):
    columns, expected = COLUMNS[name]
    write_table(pa.table(columns), tmp_path / f"train.{suffix}")
    assert code_of(lambda: scan(tmp_path)) == expected


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    write_table(pa.Table.from_arrays([TWO, TWO], names=["image", "image"]), tmp_path / f"train.{suffix}")
    assert code_of(lambda: scan(tmp_path)) == "SITE-07"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_with_any_byte_changed_is_read_or_refused_by_name(tmp_path, suffix):
    """Every 37th byte, one at a time: lengths, offsets, types, headers of pages."""
    path = tmp_path / f"train.{suffix}"
    write_table(pa.table({"image": TWO, "text": ["a rose", "a lily"]}), path)
    good = path.read_bytes()
    for place in range(0, len(good), 37):
        for byte in (0xFF, 0x7F, good[place] ^ 1):
            path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
            code_of(lambda: scan(tmp_path))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_cut_off_anywhere_is_read_or_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"train.{suffix}"
    write_table(pa.table({"image": TWO, "text": ["a rose", "a lily"]}), path)
    good = path.read_bytes()
    for length in range(0, len(good), 41):
        path.write_bytes(good[:length])
        code_of(lambda: scan(tmp_path))


# --- what lies in the folder ---

LINES = (
    STRANGE_JSON
    + [
        json.dumps(row)
        for row in (
            {"file_name": None},
            {"file_name": ["1.png"]},
            {"file_name": {"a": 1}},
            {"file_name": True},
            {"file_name": ""},
            {"file_name": "\0"},
            {"file_name": "x" * 100_000},
            {"file_name": "../" * 5000 + "etc/passwd"},
            {"file_name": "/dev/zero"},
            {"file_name": "metadata.jsonl"},
            {"file_name": "\ud800.png", "text": "a"},
            {"file_name": "3.png", "text": ["a"]},
            {"file_name": "3.png", "text": {"a": "b"}},
            {"file_name": "3.png", "text": "\ud800\udfff half"},
            {"file_name": "3.png", "text": "\0\x1b[2J"},
        )
    ]
    + ['{"file_name": "3.png", "text": ' + HUGE + "}", '{"file_name": "3.png", "text": "' + "x" * 1_000_000 + '"}']
)


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_whatever_a_list_of_captions_holds_its_pictures_are_counted_or_it_is_refused_by_name(tmp_path, line):
    folder = folder_of_two(tmp_path)
    (folder / "3.png").write_bytes(png(3))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    if code_of(lambda: scan(folder)) not in (None, "SITE-06"):
        pytest.fail("another code")


def test_a_caption_that_no_encoding_holds_is_encoded_all_the_same(tmp_path):
    folder = folder_of_two(tmp_path / "site")
    (folder / "3.png").write_bytes(png(3))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "3.png", "text": "half \\ud800 a rose"}\n')
    partition = scan(folder)
    assert partition.photos[2].caption == "half ? a rose"
    _, rows = cache.encode(
        partition, tiny.base(), model.fingerprint(tiny.base()), Plan.square(16), tmp_path / "cache", torch.device("cpu")
    )
    assert len(rows(partition.photos).texts) == 4  # and the empty caption


def test_a_caption_is_cut_where_no_text_encoder_reads_on(tmp_path):
    folder = folder_of_two(tmp_path / "site")
    pq.write_table(pa.table({"image": TWO, "text": ["rose " * 10**5, "x" * 10**6]}), folder / "train.parquet")
    # "rose " less its last space
    assert sorted(len(photo.caption) for photo in scan(folder).photos) == [9_999, 10_000]


def test_a_caption_made_from_a_template_is_cut_before_the_tokenizer_too(tmp_path, monkeypatch):
    from transformers import CLIPTokenizer

    seen, call = [], CLIPTokenizer.__call__
    monkeypatch.setattr(
        CLIPTokenizer,
        "__call__",
        lambda self, texts, **named: seen.extend(map(len, texts)) or call(self, texts, **named),
    )
    cache._encode_captions(["rose" * 10_000, "a"], tiny.base(), torch.device("cpu"))
    assert seen == [10_000, 1] * 2  # once for its length


def test_a_lists_size_and_lines_have_a_bound(tmp_path):
    folder = folder_of_two(tmp_path)
    with (folder / "metadata.jsonl").open("ab") as file:
        file.truncate(10_000_000_000)  # sparse: takes no room on disk
    assert code_of(lambda: scan(folder)) == "SITE-06"


@pytest.mark.parametrize("name", ["caption.txt", "metadata.jsonl", "train.parquet", "train.arrow", "3.png"])
def test_a_pipe_by_any_name_is_not_waited_for(tmp_path, name):
    folder_of_two(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    script = (
        "import sys, app.site.photos.data, pathlib\ntry:"
        " print(app.site.photos.data.scan(pathlib.Path(sys.argv[1])).counts)\n"
    )
    script += "except app.site.photos.data.SiteError as error: print(error.code)"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True, timeout=PATIENT
    )
    expected = {"caption.txt": "SITE-05", "metadata.jsonl": "SITE-06"}.get(name, "{'images': 2, 'unreadable': 1}")
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("name", ["caption.txt", "metadata.jsonl", "train.parquet", "train.arrow", "3.png"])
@pytest.mark.parametrize("target", ["private", "/dev/zero"])
def test_no_file_is_read_through_a_link_that_leads_out(tmp_path, name, target):
    site = folder_of_two(tmp_path / "site")
    (tmp_path / "private").write_text("a private sentence")
    (site / name).unlink(missing_ok=True)
    (site / name).symlink_to(tmp_path / target)
    if name in ("caption.txt", "metadata.jsonl"):
        with pytest.raises(BouquetError, match="SITE-0[56]") as caught:
            scan(site)
        assert "a link or path that leads out of the data folder" in caught.value.found
    else:
        assert scan(site).counts == {"images": 2, "outside": 1}


def test_a_folder_that_becomes_a_link_while_it_is_read_is_not_followed(tmp_path, monkeypatch):
    site, secret = folder_of_two(tmp_path / "site"), folder_of_two(tmp_path / "secret")
    (site / "sub").mkdir()
    (site / "sub" / "1.png").write_bytes(png(9))
    real = os.path.realpath

    def exchanged(path, **named):
        found = real(path, **named)
        if found.endswith("sub/1.png") and not (site / "sub").is_symlink():
            shutil.rmtree(site / "sub")
            (site / "sub").symlink_to(secret)
        return found

    monkeypatch.setattr(os.path, "realpath", exchanged)
    with pytest.raises(images.BadImage, match="unreadable"):
        images.open_inside(site, "sub/1.png")


def test_a_caption_template_has_a_bound(tmp_path):
    (folder_of_two(tmp_path) / "caption.txt").write_text("{" * 4001)
    assert code_of(lambda: scan(tmp_path)) == "SITE-05"


def test_a_folder_a_thousand_deep_is_read(tmp_path):
    folder_of_two(tmp_path)
    here, depth = os.getcwd(), 1500
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.png").write_bytes(png(9))
        assert scan(tmp_path).counts == {"images": 2, "no-caption": 1}
        Path("deep.png").unlink()
    finally:
        for _ in range(depth):  # shutil.rmtree, which pytest takes, calls itself
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.png", b"a\nSITE-01  line.png", b"\x1b[2J.png", "\u202egnp.png".encode()], ids=range(4)
)
def test_a_name_that_a_terminal_would_obey_is_shown_harmless(tmp_path, name):
    folder_of_two(tmp_path)
    with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"")
    report = scan(tmp_path).report()
    assert report.encode().count(b"\n") == 1 and all(line.isprintable() for line in report.splitlines())


def test_a_label_that_no_encoding_holds_makes_a_caption(tmp_path):
    folder = os.fsencode(tmp_path) + b"/ros\xe9"
    os.mkdir(folder)
    for number in (1, 2):
        with open(folder + b"/%d.png" % number, "wb") as file:
            file.write(png(number))
    assert [photo.caption for photo in scan(tmp_path, caption_template="a {label}").photos] == ["a ros?"] * 2


# --- pictures ---


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg(**options) -> bytes:
    out = BytesIO()
    Image.new("RGB", options.pop("size", (8, 8)), (9, 9, 9)).save(out, "JPEG", **options)
    return out.getvalue()


def many_scans(side: int, count: int) -> bytes:
    data = jpeg(size=(side, side), progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + b"\xff\xd9"


def with_exif(count: int) -> bytes:
    return jpeg()[:2] + (b"\xff\xe1" + struct.pack(">H", 60_008) + b"Exif\0\0" + bytes(60_000)) * count + jpeg()[2:]


HEAVY = {
    "scans of a large JPEG": lambda: many_scans(5000, 80),  # 25 million pixels, 90 scans: 2.25 thousand million
    "segments of a JPEG": lambda: jpeg()[:2] + b"\xff\xe5\x00\x02" * 10_001 + jpeg()[2:],
    "comments of a JPEG": lambda: jpeg()[:2] + b"\xff\xfe\x00\x02" * 10_001 + jpeg()[2:],
    "EXIF again and again": lambda: with_exif(17),
    "chunks of a PNG": lambda: png()[:33] + chunk(b"prVt") * 100_001 + png()[33:],
    "empty IDATs of a PNG": lambda: png()[:33] + chunk(b"IDAT") * 100_001 + png()[33:],
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_picture_that_is_the_work_of_many_is_set_aside(name):
    data = HEAVY[name]()
    assert len(data) < 2_000_000
    with pytest.raises(images.BadImage, match="^too-large$"):
        images.check(data)


LIGHT = [many_scans(64, 200), jpeg(comment=b"\xff\xda" * 10_000), jpeg() + b"\xff\xda" * 20_000, with_exif(1)]


@pytest.mark.parametrize("data", LIGHT, ids=["a small one's scans", "a comment", "what follows the end", "EXIF"])
def test_what_only_looks_heavy_is_read(data):
    images.check(data)
    assert images.rgb(data).mode == "RGB"


ODD = {
    "text chunks of 90 MB": lambda: (
        png()[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 100 + png()[33:]
    ),
    "a profile of 100 MB": lambda: (
        png()[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000_000))) + png()[33:]
    ),
    "EXIF that points everywhere": lambda: (
        jpeg()[:2]
        + b"\xff\xe1"
        + struct.pack(">H", 60_008)
        + b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", 4000)
        + b"".join(struct.pack("<HHLL", tag, 7, 50_000, 0) for tag in range(4000))
        + bytes(60_000 - 10 - 48_000)
        + jpeg()[2:]
    ),
    "a header alone": lambda: b"\xff\xd8\xff",
    "a JPEG that never ends": lambda: b"\xff\xd8\xff" * 100_000,
    "a length of nothing": lambda: b"\xff\xd8\xff\xe0\x00\x00" * 100,
    "RIFF alone": lambda: b"RIFF\xff\xff\xff\xffWEBP",
    "a WebP of 16383 pixels": lambda: b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(24),
    "a PNG chunk of 4 GB": lambda: b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
}


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("place", range(0, len(PROFILE), 11))
def test_a_profile_with_any_byte_changed_gives_a_picture(place):
    changed = PROFILE[:place] + bytes([PROFILE[place] ^ 0xFF]) + PROFILE[place + 1 :]
    assert images.rgb(jpeg(icc_profile=changed)).mode == "RGB"


@pytest.mark.parametrize("size", [(65_500, 3000), (3000, 65_500)])
def test_a_picture_of_196_megapixels_in_many_scans_or_as_png_is_set_aside_unread(size):
    for data in (png()[:16] + struct.pack(">II", *size) + png()[24:], jpeg(progressive=True)):
        at = data.find(b"\xff\xc2") + 5
        data = data if data[:1] == b"\x89" else data[:at] + struct.pack(">HH", *size) + data[at + 4 :]
        with pytest.raises(images.BadImage, match="^too-large$|^undecodable$"):
            images.check(data)


@pytest.mark.parametrize(
    "name", ["list.csv", "list.tsv", "list.txt", "list.jsonl", "0.txt", "1.caption", "sub/caption.txt"]
)
@pytest.mark.parametrize(
    "text",
    [
        b"\0" * 100,
        b"\xff\xfe",
        b"\xff" * 50,
        b'"' * 100_001,
        b"," * 200_000,
        b"1.png," + b"x" * 1_100_000,
        DEEP.encode(),
    ],
)
def test_whatever_a_text_in_the_folder_holds_it_is_counted_or_refused_by_name(tmp_path, name, text):
    folder = folder_of_two(tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text)
    assert code_of(lambda: scan(folder)) in (None, "SITE-05", "SITE-06")


@pytest.mark.parametrize("name", ["list.csv", "1.txt", "sub/caption.txt", "a"])
def test_no_text_is_read_through_a_link_that_leads_out_and_no_pipe_is_waited_for(tmp_path, name):
    (tmp_path / "private").write_text("1.png,a private sentence\n")
    site = folder_of_two(tmp_path / "site")
    (site / name).parent.mkdir(exist_ok=True)
    for make in (lambda path: path.symlink_to(tmp_path / "private"), os.mkfifo):
        make(site / name)
        with suppress(BouquetError):
            assert "private" not in str([photo.caption for photo in scan(site).photos])
        (site / name).unlink()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_read_or_set_aside(name):
    data = ODD[name]()
    for look in (images.check, images.rgb):
        with suppress(images.BadImage):
            look(data)
