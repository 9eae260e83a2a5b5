"""A folder of originals is read once: what is remembered of a file, for how long, and what of it is told."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from app.site.photos import data, folders, seen
from app.site.photos.images import BadImage
from tests.kit import tiny


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files of a data folder that are opened."""
    names, really = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *how, **named: names.append(str(path)) or really(path, *how, **named))
    return names


def site(folder: Path, count: int = 4) -> Path:
    """Pictures with one caption for all."""
    folder.mkdir()
    data_ = (tiny.site(folder.with_name("one"), count=1, public=False) / "0000.png").read_bytes()
    for number in range(count):
        (folder / f"{number:04}.png").write_bytes(data_ + b"%d" % number)
    (folder / "caption.txt").write_text("a flower\n")
    return folder


def pictures(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith((".png", ".bin", ".heic"))]


def test_two_thousand_photos_are_opened_once(tmp_path, opened):
    folder, cache = site(tmp_path / "site", 2000), tmp_path / "cache"
    first = data.scan(folder, memory=cache)
    assert len(first.photos) == 2000 and len(pictures(opened)) == 2000
    opened.clear()
    assert data.scan(folder, memory=cache) == first and pictures(opened) == []
    data.scan(folder)  # without a memory
    assert len(pictures(opened)) == 2000


def test_the_fast_check_of_a_folder_opens_no_photo(tmp_path, opened):
    folder = site(tmp_path / "site")
    assert sum(not entry.reason for entry in folders.entries(folder)) == 4 and pictures(opened) == []


def test_a_key_from_memory_is_the_sha256_of_the_bytes(tmp_path):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path)
    photo = data.scan(folder, memory=tmp_path).photos[2]
    assert photo.key == hashlib.sha256((folder / "0002.png").read_bytes()).hexdigest() and photo.read().size == (16, 16)


def again(path: Path) -> None:
    """Other bytes of the same length, with the times of the old ones."""
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)


CHANGES = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "the same length and times": again,
    "another file": replaced,
    "another name": lambda path: path.rename(path.with_name("new.png")),
    "touched": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_photo_that_was_touched_is_read_again_and_no_other(tmp_path, opened, change):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path)
    CHANGES[change](folder / "0001.png")
    opened.clear()
    told = data.scan(folder, memory=tmp_path)
    assert pictures(opened) == ["new.png" if change == "another name" else "0001.png"]
    assert told == data.scan(folder)


def test_what_is_no_photo_is_remembered_too_and_what_is_closed_for_a_moment_is_not(tmp_path, opened):
    folder = site(tmp_path / "site")
    (folder / "a.bin").write_bytes(b"neither")
    (folder / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "c.png").write_bytes(b"")
    (folder / "d.png").symlink_to("/etc/hostname")
    counts = {"images": 4, "not-a-picture": 1, "format": 1, "empty": 1, "outside": 1}
    assert data.scan(folder, memory=tmp_path).counts == counts
    opened.clear()
    assert data.scan(folder, memory=tmp_path).counts == counts and pictures(opened) == []
    (folder / "d.png").unlink()
    replaced(folder / "0000.png")
    (folder / "0000.png").rename(folder / "d.png")
    assert data.scan(folder, memory=tmp_path).counts == {"images": 4, "not-a-picture": 1, "format": 1, "empty": 1}


DAMAGE = ["", "{", "[]", "3", '{"a": 1}', "\0" * 50, "[" * 100_000]


@pytest.mark.parametrize("text", DAMAGE, ids=range(len(DAMAGE)))
def test_a_memory_that_is_damaged_is_made_anew(tmp_path, opened, text):
    folder = site(tmp_path / "site")
    first = data.scan(folder, memory=tmp_path)
    good = (tmp_path / seen.FILE).read_text()
    (tmp_path / seen.FILE).write_text(text)
    opened.clear()
    assert data.scan(folder, memory=tmp_path) == first and len(pictures(opened)) == 4
    assert (tmp_path / seen.FILE).read_text() == good


def test_a_memory_that_lies_is_found_out_when_the_photo_is_read(tmp_path):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path)
    told = json.loads((tmp_path / seen.FILE).read_text())
    (tmp_path / seen.FILE).write_text(json.dumps({key: f"{number:064}" for number, key in enumerate(told)}))
    with pytest.raises(BadImage, match="^changed$"):
        data.scan(folder, memory=tmp_path).photos[0].read()
    (tmp_path / seen.FILE).write_text(json.dumps(dict.fromkeys(told, "!nonsense")))
    assert data.scan(folder, memory=tmp_path).counts == {"images": 4}


def test_the_memory_names_no_file_and_is_for_this_user_alone(tmp_path):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and ".png" not in file.read_text() and "flower" not in file.read_text()


def test_the_memory_forgets_what_is_gone(tmp_path):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path)
    (folder / "0001.png").unlink()
    data.scan(folder, memory=tmp_path)
    assert len(json.loads((tmp_path / seen.FILE).read_text())) == 3


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    folder = site(tmp_path / "site")
    (tmp_path / "cache").write_text("a file in its place")
    assert data.scan(folder, memory=tmp_path / "cache").counts == {"images": 4}


def test_another_reading_of_pictures_looks_at_each_again(tmp_path, opened, monkeypatch):
    folder = site(tmp_path / "site")
    data.scan(folder, memory=tmp_path)
    monkeypatch.setattr(seen, "READING", 99)
    opened.clear()
    data.scan(folder, memory=tmp_path)
    assert len(pictures(opened)) == 4
