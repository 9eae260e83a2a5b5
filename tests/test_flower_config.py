"""Flower's config.toml belongs to its user: our one entry in it, whatever is there already, nothing else changed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from app.errors import BouquetError
from bouquet.hub.runs import CONNECTION, connect

OURS = {"address": "127.0.0.1:8443", "root-certificates": "/ca.crt"}
OTHERS = {  # legal spellings of an entry of the same name, and what else stands beside it
    "a table": '[superlink.remote-deployment]\naddress = "other:1"\n\n[superlink.x] # mine\naddress = "x:1"\n',
    "quoted": '[superlink."remote-deployment"]\naddress = "other:1"\n[superlink.x] # mine\naddress = "x:1"\n',
    "spaced": (
        "[ superlink . 'remote-deployment' ] # theirs\naddress = 'other:1'\n[superlink.x] # mine\naddress = 'x:1'\n"
    ),
    "inline": '# mine\n[superlink]\nremote-deployment = { address = "other:1" }\nx = { address = "x:1" }\n',
    "all inline": 'superlink = { remote-deployment = { address = "other:1" }, x = { address = "x:1" } }\n',
    "dotted": 'superlink.remote-deployment.address = "other:1"\nsuperlink.x.address = "x:1"\n',
    "with a table below": (
        '[superlink.x]\naddress = "x:1"\n[superlink.remote-deployment]\naddress ='
        ' "other:1"\n[superlink.remote-deployment.options]\nnum-supernodes = 2\n'
    ),
    "no string": '[superlink]\nremote-deployment = 3\nx = { address = "x:1" }\n',
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path / "config.toml"


def connected(file: Path) -> list[str]:
    """What was said."""
    said: list[str] = []
    connect(OURS["address"], Path(OURS["root-certificates"]), said.append)
    return said


@pytest.mark.parametrize("spelling", OTHERS)
def test_another_projects_entry_however_it_is_spelled_is_replaced_and_what_was_there_is_kept(
    file: Path, spelling: str
) -> None:
    file.write_text(OTHERS[spelling])
    [said] = connected(file)
    assert tomllib.loads(file.read_text()) == {"superlink": {CONNECTION: OURS, "x": {"address": "x:1"}}}
    assert (file.parent / "config.toml.1").read_text() == OTHERS[spelling]
    assert "another project's" in said and str(file.parent / "config.toml.1") in said


def test_the_rest_of_the_file_keeps_its_comments_and_its_order(file: Path) -> None:
    file.write_text(
        '# first\n[superlink]\ndefault = "x" # why\n\n[superlink.remote-deployment]\naddress ='
        ' "old:1"\nroot-certificates = "/ca.crt"\n\n# last\n[superlink.x]\naddress = "x:1"\n'
    )
    assert connected(file) == []  # an entry of these certificates is this clone's own
    assert (
        file.read_text() == '# first\n[superlink]\ndefault = "x" # why\n\n\n# last\n[superlink.x]\naddress = "x:1"\n\n'
        '[superlink.remote-deployment]\naddress = "127.0.0.1:8443"\nroot-certificates = "/ca.crt"\n'
    )
    assert tomllib.loads(file.read_text())["superlink"] == {"default": "x", "x": {"address": "x:1"}, CONNECTION: OURS}
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.toml"]


def test_a_second_time_changes_nothing_and_two_clones_by_turns_keep_two_copies(file: Path) -> None:
    file.write_text('[superlink.x]\naddress = "x:1"\n')
    assert connected(file) == []
    once = file.read_bytes()
    assert connected(file) == [] and file.read_bytes() == once
    for _ in range(3):
        connect("127.0.0.1:9443", Path("/other.crt"), lambda line: None)
        connected(file)
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.toml", "config.toml.1", "config.toml.2"]


def test_a_file_with_a_mark_of_its_byte_order_is_read_and_one_in_a_string_is_left(file: Path) -> None:
    file.write_text(
        '\ufeffnote = """\n[superlink.remote-deployment]\naddress = 1\n"""\n[superlink.x]\naddress = "x:1"\n'
    )
    connected(file)
    assert tomllib.loads(file.read_text()) == {
        "note": "[superlink.remote-deployment]\naddress = 1\n",
        "superlink": {"x": {"address": "x:1"}, CONNECTION: OURS},
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"superlink = [\n", b"superlink = 3\n", b"\xff\xfe", b"[superlink.a]\n[superlink.a]\n"]
)
def test_a_file_that_cannot_be_read_is_named_and_left_as_it_is(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(BouquetError, match="HOST-16") as caught:
        connected(file)
    assert str(file) in caught.value.found and file.read_bytes() == content


def test_without_a_file_flower_makes_its_own_first(file: Path) -> None:
    connected(file)
    links = tomllib.loads(file.read_text())["superlink"]
    assert links[CONNECTION] == OURS and links.keys() > {"default", "local"}
