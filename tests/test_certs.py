"""scripts/certs: the names that are used, private keys that stay private, and errors a person can act on."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from conftest import copy_project, sh
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

PRIVATE = ("ca.key", "superlink.key", "superexec.secret", "site-1.key", "site-2.key")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy of the project in which scripts/certs has run."""
    copy = copy_project(tmp_path / "bouquet")
    sh("scripts/certs", copy)
    return copy


def server(made: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((made / "certs/superlink.crt").read_bytes())


def names(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def expire(made: Path) -> None:
    """Put a server certificate in place that ended yesterday; signed by the same CA, with the same names."""
    sh(
        "openssl req -new -key superlink.key -subj /CN=superlink -out s.csr && "
        "printf 'subjectAltName=DNS:localhost,DNS:superlink,IP:127.0.0.1' >s.ext && "
        "openssl x509 -req -in s.csr -CA ca.crt -CAkey ca.key -set_serial 7 -days -1 -extfile s.ext -out superlink.crt",
        made / "certs",
    )


def test_the_server_certificate_has_the_names_that_are_used(made: Path) -> None:
    assert names(server(made)) == {"localhost", "superlink", "gateway", "127.0.0.1"}


def test_private_files_are_readable_by_their_owner_alone(made: Path) -> None:
    assert {name: stat.S_IMODE((made / "certs" / name).stat().st_mode) for name in PRIVATE} == dict.fromkeys(
        PRIVATE, 0o600
    )


def test_nothing_that_certs_makes_can_enter_git(made: Path) -> None:
    sh("git init -q && git add -A", made)
    assert sh("git ls-files certs", made).stdout.split() == ["certs/.gitignore", "certs/README.md"]


def test_a_site_key_is_an_openssh_p384_key_and_its_public_half_is_the_admission(made: Path) -> None:
    private = load_ssh_private_key((made / "certs/site-1.key").read_bytes(), password=None)
    admitted = load_ssh_public_key((made / "certs/admitted/site-1.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
    assert private.public_key() == admitted


def test_a_second_run_changes_nothing(made: Path) -> None:
    before = {file: file.read_bytes() for file in (made / "certs").rglob("*") if file.is_file()}
    sh("scripts/certs", made)
    assert {file: file.read_bytes() for file in (made / "certs").rglob("*") if file.is_file()} == before


def test_a_third_site_leaves_the_other_keys_as_they_are(made: Path) -> None:
    before = (made / "certs/site-1.key").read_bytes(), (made / "certs/superlink.crt").read_bytes()
    sh("scripts/certs site-3", made)
    assert ((made / "certs/site-1.key").read_bytes(), (made / "certs/superlink.crt").read_bytes()) == before
    assert (made / "certs/admitted/site-3.pub").is_file()


def test_a_missing_name_is_named_and_making_again_adds_it_with_the_same_ca(made: Path) -> None:
    ca = (made / "certs/ca.crt").read_bytes()
    hub = {"HUB_HOST": "hub.example.org 192.0.2.7 2001:db8::1"}
    wrong = sh("scripts/certs check", made, check=False, **hub)
    assert wrong.returncode == 1
    assert wrong.stdout.splitlines()[:2] == [
        "CERT-01  The hub's certificate lacks a name that is used.",
        "  found  missing: hub.example.org 192.0.2.7 2001:db8::1 ",
    ]
    sh("scripts/certs && scripts/certs check", made, **hub)
    assert names(server(made)) == {
        "localhost",
        "superlink",
        "gateway",
        "127.0.0.1",
        "hub.example.org",
        "192.0.2.7",
        "2001:db8::1",
    }
    assert (made / "certs/ca.crt").read_bytes() == ca


def test_an_expired_certificate_is_named_and_renewed_with_the_same_ca(made: Path) -> None:
    ca = (made / "certs/ca.crt").read_bytes()
    expire(made)
    wrong = sh("scripts/certs check", made, check=False)
    assert wrong.returncode == 1 and wrong.stdout.startswith("CERT-02  The hub's certificate has expired.")
    assert "EXPIRED" in sh("scripts/certs status", made).stdout
    sh("scripts/certs renew && scripts/certs check", made)
    assert (made / "certs/ca.crt").read_bytes() == ca


def test_a_lost_ca_key_is_named_instead_of_replaced(made: Path) -> None:
    (made / "certs/ca.key").unlink()
    expire_now = sh("rm certs/superlink.crt && scripts/certs", made, check=False)
    assert expire_now.returncode == 1 and expire_now.stdout.startswith(
        "CERT-03  The hub has no certificate, or one that does not fit."
    )


def test_status_shows_expiry_names_and_the_admitted_sites(made: Path) -> None:
    shown = sh("scripts/certs status", made).stdout
    assert f"{server(made).not_valid_after_utc:%H:%M:%S %Y}" in shown and "DNS:superlink" in shown
    assert "site-1" in shown and "SHA256:" in shown


# --- HUB_HOST as people write it
# -------------------------------------------------------------------------------------------

OWN = {"localhost", "superlink", "gateway", "127.0.0.1"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('HUB_HOST="hub.example.org 192.0.2.7" # both', {"hub.example.org", "192.0.2.7"}),
        ("export HUB_HOST='hub.example.org'\r", {"hub.example.org"}),
        ("HUB_HOST = hub.example.org, [2001:db8::7]", {"hub.example.org", "2001:db8::7"}),
    ],
)
def test_a_hubs_names_are_read_as_people_write_them(tmp_path: Path, line: str, expected: set[str]) -> None:
    copy = copy_project(tmp_path / "bouquet")
    (copy / ".env").write_bytes(f"{line}\n".encode())
    sh("scripts/certs && scripts/certs check", copy)
    assert names(server(copy)) == OWN | expected


@pytest.mark.parametrize("value", ["https://hub.example.org", "hub.example.org:8443", "1.2.3.4.5"])
def test_a_name_that_is_none_is_named_before_anything_is_made(tmp_path: Path, value: str) -> None:
    copy = copy_project(tmp_path / "bouquet")
    (copy / ".env").write_text(f"HUB_HOST={value}\n")
    told = sh("scripts/certs", copy, check=False)
    assert told.returncode == 1 and told.stdout.startswith(
        f"CERT-05  That is no name of the hub.\n  found  HUB_HOST has {value}\n"
    )
    assert not list((copy / "certs").glob("*.key"))


def test_a_certificate_is_renewed_where_no_site_is_left(made: Path) -> None:
    sh("rm certs/admitted/*.pub certs/site-*.key && scripts/certs renew", made)


# --- cut off
# ---------------------------------------------------------------------------------------------------------------------

MOVES = (
    "ca.key",
    "ca.crt",
    "superlink.key",
    "superlink.crt",
    "superexec.secret",
    "site-1.pub",
    "site-1.key",
    "site-2.pub",
    "site-2.key",
)


@pytest.mark.parametrize("place", MOVES)
def test_a_kill_after_any_file_has_come_to_its_place_leaves_what_the_next_run_makes_whole(
    tmp_path: Path, place: str
) -> None:
    copy = copy_project(tmp_path / "bouquet")
    deadly = tmp_path / "bin/mv"
    deadly.parent.mkdir()
    deadly.write_text(
        '#!/bin/sh\n/bin/mv "$@" || exit\nfor last; do :; done\n[ "${last##*/}" != "$PLACE" ] || kill -9 $PPID\n'
    )
    deadly.chmod(0o755)
    cut = sh("scripts/certs", copy, check=False, PATH=f"{deadly.parent}:{os.environ['PATH']}", PLACE=place)
    assert cut.returncode in (-9, 137) and len(list((copy / "certs").rglob(place))) == 1
    sh("scripts/certs && scripts/certs check", copy)
    certs = copy / "certs"
    for site in ("site-1", "site-2"):
        public = sh(f"ssh-keygen -y -f certs/{site}.key", copy).stdout.split()
        assert (certs / f"admitted/{site}.pub").read_text().split()[:2] == public[:2]
    assert len((certs / "superexec.secret").read_text()) == 64 and list(certs.glob("*.new*")) == []


def test_a_certificate_of_another_key_is_named_and_made_anew(made: Path) -> None:
    """As a kill between the two moves of a renewal leaves it."""
    sh("openssl ecparam -name prime256v1 -genkey -noout -out certs/superlink.key", made)
    told = sh("scripts/certs check", made, check=False)
    assert told.returncode == 1 and told.stdout.startswith(
        "CERT-03  The hub has no certificate, or one that does not fit."
    )
    sh("scripts/certs && scripts/certs check", made)
