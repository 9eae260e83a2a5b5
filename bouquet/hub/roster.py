"""What the hub knows of its sites: registrations from the SuperLink's Control API, deeds from the runs' history.json.

Enters: the connection of `flwr run . remote-deployment`, the adapters folder. Leaves: one row a site, by name.
Errors: JOIN-02 (not a public key), HOST-08 (no answer from Control).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from app import text
from app.errors import BouquetError
from app.hub.history import History
from bouquet.hub import adapters, control

PATIENCE = 2  # heartbeats after which the SuperLink calls a node offline (flwr.common.constant.HEARTBEAT_PATIENCE)


@dataclass(frozen=True)
class Key:
    """A public key as OpenSSH writes it, 'type base64', without the comment."""

    line: str

    @classmethod
    def read(cls, file: Path) -> Key:
        """Errors: JOIN-02 unless the file is the OpenSSH public key of a NIST curve."""
        try:
            return cls.of(load_ssh_public_key(file.read_bytes()))
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            found = (
                f"{file}: {error.strerror if isinstance(error, OSError) else 'no public ECDSA key in OpenSSH format'}"
            )
            raise BouquetError("JOIN-02", found=found, fix="take the NAME.pub that ./site init made") from None

    @classmethod
    def of(cls, key: Any) -> Key:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError(type(key))
        return cls(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())

    @property
    def pem(self) -> bytes:
        """As the hub takes it."""
        return load_ssh_public_key(self.line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -lf` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.line.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True)
class Site:
    """One registration. state: online, offline, admitted (never seen) or revoked; seen: UTC, ISO 8601."""

    name: str
    state: str
    seen: str | None
    key: Key
    node: int


def registered() -> list[Site]:
    """Every registration the SuperLink remembers, oldest first. `flwr supernode ls` would give no names. Errors:
    HOST-08.
    """
    return [site_of(node) for node in control.nodes()]


def site_of(node: Any) -> Site:
    key = Key.of(load_pem_public_key(node.public_key))
    state = {"registered": "admitted", "unregistered": "revoked"}.get(node.status, node.status)
    seen = node.last_deactivated_at or node.unregistered_at * bool(node.last_activated_at) or None
    if state == "online":
        seen = datetime.fromtimestamp(node.online_until - PATIENCE * node.heartbeat_interval, UTC).isoformat()
    return Site(text.line(node.name, 80) or key.fingerprint, state, seen, key, node.node_id)


def table(admitted: Path, kits: Path) -> list[dict[str, Any]]:
    """A row for every name: registered ones, then those that wait for the next `up`, then those that have a kit and no
    key yet.
    """
    # the latest counts
    rows = {site.name: {"name": site.name, "state": site.state, "last-seen": site.seen} for site in registered()}
    names = {
        "waiting": sorted(file.stem for file in admitted.glob("*.pub")),
        "invited": sorted(folder.name for folder in kits.glob("*/")),
    }
    for state in names:
        for name in names[state]:
            rows.setdefault(name, {"name": name, "state": state, "last-seen": None})
    done = deeds(adapters.histories())
    nothing = {"images": None, "gpu": None, "rounds": 0}
    return [row | nothing | done.get(name, {}) for name, row in sorted(rows.items())]


def deeds(histories: Iterable[History]) -> dict[str, dict[str, Any]]:
    """By site: images and GPU in its last round, rounds it took part in, over all runs, the newest last."""
    found: dict[str, dict[str, Any]] = {}
    for history in histories:
        for entry in history.rounds:
            for name, part in entry.sites.items():
                site = found.setdefault(name, {"images": None, "gpu": None, "rounds": 0})
                site["gpu"] = part.gpu or site["gpu"]
                site["images"] = site["images"] if part.images is None else part.images
                site["rounds"] += 1
    return found
