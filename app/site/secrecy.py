"""A site's part in a sum that hides its own: which peers it knows, a key for each try of a round, its hidden update.

The site's operator says who the peers are, in SITE_PEERS: `lily=SHA256:… rose=SHA256:…`, each site's name and the
fingerprint that `./site init` printed there, read out by the sites to each other and not by the hub. The keys are
signed with the site's own admitted key (key-path of the node config); to know it is to trust it.
A key is made for one try of one round, lies in `masks` of the cache until then or until the next one, and is used once:
its file changes its name before anything is hidden with it, stays as the mark that this try is over, and is emptied.
Enters: the SuperNode's node config, the offers that the hub passes on. Leaves: an offer, a hidden update.
Errors: TRUST-14, whatever of it does not hold; ADAPTER-02.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from app import masks, text
from app.config import RunConfig
from app.errors import AdapterError, SiteError
from app.model import Adapter

FOLDER = "masks"  # in the cache


@dataclass(frozen=True)
class Own:
    """Who this site is, whom it knows, and where its keys lie."""

    site: str
    peers: Mapping[str, str]  # name -> fingerprint; the site's own may be among them
    identity: EllipticCurvePrivateKey
    folder: Path

    @classmethod
    def read(cls, node: Mapping[str, object], site: str, cached: Path) -> Own:
        """Errors: TRUST-14 where the site has named no peers, or no key of its own."""
        peers = read_peers(str(node.get("peers", "")))
        if len(peers.keys() | {site}) < masks.LEAST:
            raise _refused(
                "the site has pinned no two peers",
                f"SITE_PEERS names {', '.join(peers) or 'nobody'}",
                "set SITE_PEERS='NAME=SHA256:… NAME=SHA256:…' and start the SuperNode again",
            )
        try:
            identity = load_ssh_private_key(Path(str(node["key-path"])).read_bytes(), password=None)
            if not isinstance(identity, EllipticCurvePrivateKey):
                raise TypeError
        except (LookupError, OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            why, fix = "the site's own key cannot be read", 'give the SuperNode key-path="…" in --node-config'
            raise _refused(why, f"{type(error).__name__} for {node.get('key-path', 'no key-path')}", fix) from None
        return cls(site, peers, identity, cached / FOLDER)

    def offer(self, config: RunConfig, images: int, run: str, number: int, attempt: int) -> str:
        """A new key for this try, signed. Errors: TRUST-14 where it had one already, or is none of the run's."""
        if not 0 <= attempt <= config.round_retries:
            raise _refused("the run has no such try", f"attempt {attempt}, round-retries {config.round_retries}")
        secret = X25519PrivateKey.generate()
        public = secret.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
        said = masks.offer(masks.Key(self.site, images, run, number, attempt, public), self.identity)
        private = secret.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()).hex()
        file = self._file(run, number, attempt)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if file.exists() or file.with_suffix(".used").exists():
                raise FileExistsError
            for older in self.folder.glob(f"{int(run)}-*.key"):
                _use_up(older)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
                json.dump({"offer": said, "secret": private}, out)
        except FileExistsError:
            raise _refused("this try was asked for before", file.name) from None
        return said

    def agree(self, config: RunConfig, texts: Iterable[str], run: str, number: int, attempt: int, applied: str) -> Pact:
        """Who hides this try's sum together; uses this site's key up. applied: hash of the adapter that all start from.

        Errors: TRUST-14.
        """
        file = self._file(run, number, attempt)
        try:
            kept = json.loads(_use_up(file))
        except (OSError, ValueError) as error:
            why = "this site has no key for this try, or has used it"
            raise _refused(why, f"{file.name}: {type(error).__name__}") from None
        offers = [self._read(one, run, number, attempt) for one in texts]
        names = [one.key.site for one in offers]
        least = max(masks.LEAST, config.min_sites)
        if len(set(names)) < len(names) or len(names) < least:
            raise _refused(f"fewer than {least} sites take part", f"offers of {', '.join(names) or 'nobody'}")
        if kept["offer"] not in [one.text for one in offers]:
            raise _refused("this site's own key is not among them", f"offers of {', '.join(names)}")
        share = masks.shares({one.key.site: one.key.images for one in offers}, config.largest_share)[self.site]
        context = masks.agreed(offers, run, number, attempt, applied, config.update_clip, config.largest_share)
        secret = X25519PrivateKey.from_private_bytes(bytes.fromhex(kept["secret"]))
        return Pact(self.site, share, config.update_clip, secret, tuple(offers), context)

    def _read(self, said: str, run: str, number: int, attempt: int) -> masks.Offer:
        """An offer of a peer that was pinned, for this try."""
        try:
            one = masks.read(said)
        except ValueError as error:
            raise _refused(str(error), text.line(said, 200)) from None
        key, name = one.key, text.line(one.key.site, 80)
        if key.site != self.site and one.fingerprint != self.peers.get(key.site):
            found = f"{name} has {one.fingerprint}, SITE_PEERS says {self.peers.get(key.site, 'nothing')}"
            raise _refused("a site takes part whose key was not pinned here", found)
        if (key.run, key.round, key.attempt) != (run, number, attempt):
            raise _refused("a key is for another try", f"{name}'s is for {key.run[:20]} {key.round} {key.attempt}")
        return one

    def _file(self, run: str, number: int, attempt: int) -> Path:
        return self.folder / f"{int(run)}-{number}-{attempt}.key"


def read_peers(text: str) -> dict[str, str]:
    """SITE_PEERS: name -> fingerprint. Errors: TRUST-14 for a word that is no such pair."""
    pairs = [word.partition("=") for word in text.split()]
    if wrong := [
        "".join(pair) for pair in pairs if not (pair[0] and re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", pair[2]))
    ]:
        fix = "write NAME=SHA256:… for each site, as `./site init` printed it there"
        raise _refused("the site's list of its peers cannot be read", f"{wrong[0]!r} in SITE_PEERS", fix)
    return {name: fingerprint for name, _, fingerprint in pairs}


def _use_up(file: Path) -> str:
    """What a key's file holds, once: its name changes first, which only one process can do, and it is emptied."""
    used = file.rename(file.with_suffix(".used"))
    held = used.read_text()
    used.write_text("")
    return held


@dataclass(frozen=True)
class Pact:
    """All that a site needs to hide one update, once."""

    site: str
    share: float
    clip: float
    secret: X25519PrivateKey
    offers: tuple[masks.Offer, ...]
    context: bytes

    def hide(self, before: Adapter, after: Adapter) -> Adapter:
        """What leaves: one tensor in which this site's update cannot be seen. Errors: ADAPTER-02."""
        update = masks.flat(after) - masks.flat(before)
        if not np.isfinite(update).all():
            raise AdapterError("ADAPTER-02", found="NaN or infinity in the update", fix="lower learning-rate")
        if (length := float(np.linalg.norm(update))) > self.clip:
            print(f"bouquet: the update is clipped from length {length:.3g} to update-clip={self.clip:g}", flush=True)
        return masks.packed(
            masks.hide(update, self.share, self.clip, self.site, self.secret, self.offers, self.context)
        )


def _refused(
    why: str, found: str, fix: str = "ask the hub's operator and the other sites who asks for this"
) -> SiteError:
    return SiteError("TRUST-14", why=why, found=found, fix=fix)
