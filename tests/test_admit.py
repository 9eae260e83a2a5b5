"""`bouquet hub admit` and `revoke`, refused or cut off between two steps: what stood stands, nobody is half in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from app import audit, files
from app.errors import BouquetError
from app.hub import server_app
from bouquet.hub import admission, control, roster


class Hub:
    """What the SuperLink remembers; it refuses, or the command is cut off at the step that is named."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, roster.Site] = {}
        self.refuses, self.cut, self.admitted = False, "", folder / "admitted"
        write, unlink = files.write, Path.unlink
        monkeypatch.setattr(admission, "ADMITTED", self.admitted)
        monkeypatch.setattr(roster, "registered", lambda: list(self.known.values()))
        monkeypatch.setattr(control, "register", self.register)
        monkeypatch.setattr(control, "unregister", self.unregister)
        monkeypatch.setattr(files, "write", lambda file, *what: (self.step(f"write {file.name}"), write(file, *what)))
        monkeypatch.setattr(Path, "unlink", lambda file, **how: (self.step(f"unlink {file.name}"), unlink(file, **how)))

    def step(self, name: str) -> None:
        if name == self.cut:
            raise KeyboardInterrupt(name)

    def register(self, name: str, pem: bytes) -> None:
        if self.refuses:
            raise BouquetError("HOST-08", did="refused register-node", found="500", fix="")
        self.step("register")
        self.known[name] = roster.Site(name, "admitted", None, roster.Key.of(load_pem_public_key(pem)), len(self.known))

    def unregister(self, node: int) -> None:
        self.step("unregister")
        self.known = {name: site for name, site in self.known.items() if site.node != node}

    def files(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in sorted(self.admitted.glob("*")) if file.suffix != ".jsonl"}

    def deeds(self) -> list[tuple[str, str]]:
        """Of the audit log beside them."""
        found = audit.check((self.admitted / "audit.jsonl").read_bytes())
        assert found.faults == ()
        return [(entry["did"], entry["site"]) for entry in found.entries[1:]]

    def in_rounds(self, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], dict[str, int]]:
        """Whose replies the ServerApp takes, and the images that some count with at most."""
        monkeypatch.setenv("BOUQUET_ADMITTED", str(self.admitted))
        return server_app._admitted()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def key(folder: Path) -> Path:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    (folder / "garden.pub").write_bytes(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return folder / "garden.pub"


def admit(file: Path, images: int | None = 5) -> None:
    read_out = roster.Key.read(file).fingerprint
    admission.admit("garden", file, images, read_out)


def revoke() -> None:
    admission.revoke("garden")


@pytest.mark.parametrize("stood", [{}, {"garden.pub": "waits", "garden.json": '{"images": 9}\n'}])
def test_a_refused_admission_takes_back_nothing_that_stood_and_leaves_nothing(hub, tmp_path, stood):
    hub.admitted.mkdir()
    for name, content in stood.items():
        (hub.admitted / name).write_text(content)
    hub.refuses = True
    with pytest.raises(BouquetError, match="HOST-08"):
        admit(key(tmp_path))
    assert hub.files() == stood


@pytest.mark.parametrize("cut", ["register", "write garden.json", "write garden.pub"])
def test_an_admission_that_is_cut_off_lets_nobody_in_and_is_ended_by_the_same_command(hub, tmp_path, monkeypatch, cut):
    file, hub.cut = key(tmp_path), cut
    with pytest.raises(KeyboardInterrupt):
        admit(file)
    assert "garden" not in hub.in_rounds(monkeypatch)[0]
    hub.cut = ""
    admit(file)
    assert hub.in_rounds(monkeypatch) == ({"garden"}, {"garden": 5}) and hub.known.keys() == {"garden"}
    assert hub.files() == {"garden.json": '{"images": 5}\n', "garden.pub": f"{roster.Key.read(file).line} garden\n"}


@pytest.mark.parametrize("cut", ["unlink garden.pub", "unlink garden.json", "unregister"])
def test_a_revocation_that_is_cut_off_is_ended_by_the_same_command(hub, tmp_path, monkeypatch, cut):
    admit(key(tmp_path))
    hub.cut = cut
    with pytest.raises(KeyboardInterrupt):
        revoke()
    assert cut == "unlink garden.pub" or "garden" not in hub.in_rounds(monkeypatch)[0]
    hub.cut = ""
    revoke()
    assert hub.files() == {} and hub.known == {}


def test_who_is_admitted_and_revoked_is_logged_once_it_is_done_and_a_refusal_is_not(hub, tmp_path):
    admit(key(tmp_path))
    revoke()
    assert hub.deeds() == [("admitted", "garden"), ("revoked", "garden")]
    with pytest.raises(BouquetError, match="JOIN-06"):
        revoke()
    assert len(hub.deeds()) == 2


def test_what_is_written_is_there_whole_or_not_at_all(hub, tmp_path, monkeypatch):
    """A torn NAME.json would end every run."""
    admit(key(tmp_path))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        admit(tmp_path / "garden.pub", images=7)
    assert hub.in_rounds(monkeypatch) == ({"garden"}, {"garden": 5})
    assert json.loads(hub.files()["garden.json"]) == {"images": 5}
