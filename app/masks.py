"""A sum of the sites' updates of which nobody sees a part: pairwise masks, and the keys that they are made from.

A site's update (its adapter less the global one) is clipped to a length that the run names, multiplied by the site's
share of the weight, and turned into whole numbers modulo 2^32. Each pair of sites has one stream of random numbers,
which one of them adds and the other subtracts: what leaves a site looks like chance, and in the sum of all of them the
streams are gone. Nothing is left over to be asked for when a site drops out: the others begin again with new keys.
A stream is AES-256-CTR (NIST SP 800-38A) under HKDF-SHA256 (RFC 5869) of an X25519 secret (RFC 7748) and of everything
that two sites have to agree on. Each X25519 key is for one try of one round and signed by the site's own admitted key
(ECDSA, SHA-256), which the other sites know by its fingerprint: a hub that hands out keys of its own is found out.
Source: Bonawitz et al. 2017, doi:10.1145/3133956.3133982, of which this is the part for sites that know each other.
Enters: adapters, offers (a line of JSON each). Leaves: int32 numbers; and back, their mean.
Errors: ValueError for an offer that is none, with a sentence that may go out.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from numpy.typing import NDArray

from app import metrics
from app.model import Adapter

LEAST = 3  # sites: of a sum of two, each of them learns what the other sent
NAME = "masked"  # of the one tensor that a site sends
MOST = 4096  # characters of an offer
BITS = 30  # of a whole number as large as the clip; the sum of all has room for one more, and the sign


@dataclass(frozen=True)
class Key:
    """What a site signs: a key (X25519, hex) for one try of one round, and the images that it counts for."""

    site: str
    images: int
    run: str
    round: int
    attempt: int
    key: str


@dataclass(frozen=True)
class Offer:
    """A signed key. text: as it travels; identity: the site's public key, in OpenSSH's words."""

    key: Key
    identity: str
    text: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -lf` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.identity.split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def offer(key: Key, identity: EllipticCurvePrivateKey) -> str:
    """The key, signed: one line of ASCII."""
    body = json.dumps(asdict(key), sort_keys=True)
    public = identity.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return json.dumps(
        {"body": body, "identity": public, "signature": identity.sign(_said(body), ECDSA(SHA256())).hex()}
    )


def read(text: str) -> Offer:
    """An offer whose signature is right; whether its identity is the site's is for who pinned it to say."""
    try:
        if len(text) > MOST or not text.isascii():
            raise ValueError
        parts = json.loads(text)
        body, identity = str(parts["body"]), " ".join(str(parts["identity"]).split())
        public = load_ssh_public_key(identity.encode())
        if not isinstance(public, EllipticCurvePublicKey):
            raise ValueError
        public.verify(bytes.fromhex(parts["signature"]), _said(body), ECDSA(SHA256()))
        key = Key(**json.loads(body))
        if [type(value) for value in asdict(key).values()] != [str, int, str, int, int, str] or key.images < 1:
            raise ValueError
        X25519PublicKey.from_public_bytes(bytes.fromhex(key.key))
    except (ValueError, TypeError, LookupError, RecursionError, InvalidSignature, UnsupportedAlgorithm):
        raise ValueError("a key is not signed as it should be") from None
    return Offer(key, identity, text)


def _said(body: str) -> bytes:
    """The bytes that are signed: nothing else that this key signs begins like that."""
    return b"bouquet mask key\n" + body.encode()


def shares(images: Mapping[str, int], largest_share: float) -> dict[str, float]:
    """Each site's part of the mean, as the hub weighs it: by its images, and none more than `largest_share`."""
    total = sum(images.values())
    counted = {site: min(own, metrics.most_images(total - own, largest_share)) for site, own in images.items()}
    return {site: own / sum(counted.values()) for site, own in counted.items()}


def agreed(offers: Iterable[Offer], *settings: object) -> bytes:
    """32 bytes over who takes part, with which keys, and all else that every site has to have alike."""
    texts = sorted(one.text for one in offers)
    return hashlib.sha256(json.dumps([texts, [str(setting) for setting in settings]]).encode()).digest()


def hide(
    update: NDArray[np.float64],
    share: float,
    clip: float,
    site: str,
    secret: X25519PrivateKey,
    offers: Iterable[Offer],
    context: bytes,
) -> NDArray[np.uint32]:
    """What leaves `site`: its share of the clipped update, as whole steps modulo 2^32, under a mask for each peer."""
    hidden = fixed(share * clipped(update, clip), clip)
    for peer in offers:
        if peer.key.site != site:
            shared = secret.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(peer.key.key)))
            mask = stream(shared, context, len(hidden))
            hidden = hidden + mask if site < peer.key.site else hidden - mask
    return hidden


def stream(shared: bytes, context: bytes, count: int) -> NDArray[np.uint32]:
    """`count` random numbers that follow from a secret and a context, of which no two are ever the same."""
    key = HKDF(SHA256(), 32, salt=None, info=b"bouquet mask\n" + context).derive(shared)
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), "<u4")


def clipped(update: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    """The update, made `clip` long where it is longer."""
    length = float(np.linalg.norm(update))
    return update * (clip / length) if length > clip else update


def step(clip: float) -> float:
    """What one is worth: no mean of clipped updates can have a number that wraps around."""
    return clip * 2.0**-BITS


def fixed(numbers: NDArray[np.float64], clip: float) -> NDArray[np.uint32]:
    return np.rint(numbers / step(clip)).astype(np.int64).astype(np.uint32)


def mean(hidden: Iterable[NDArray[np.uint32]], clip: float) -> NDArray[np.float64]:
    """The weighted mean of the clipped updates, off by half a step for each site at most."""
    total = reduce(operator.add, hidden)
    return total.astype(np.int32).astype(np.float64) * step(clip)


def packed(hidden: NDArray[np.uint32]) -> Adapter:
    """As it travels, and as a journal keeps it: one tensor, as many bytes as the adapter has in float32."""
    return {NAME: torch.from_numpy(hidden.view(np.int32))}


def unpacked(sent: Mapping[str, torch.Tensor]) -> NDArray[np.uint32]:
    return sent[NAME].numpy().view(np.uint32)


def flat(adapter: Mapping[str, torch.Tensor]) -> NDArray[np.float64]:
    """All numbers, in the order of their names."""
    return torch.cat([adapter[key].flatten().double() for key in sorted(adapter)]).numpy()


def moved(adapter: Adapter, update: NDArray[np.float64]) -> Adapter:
    """The adapter with a flat update added, in float32."""
    new, at = {}, 0
    for key in sorted(adapter):
        part = torch.from_numpy(update[at : at + adapter[key].numel()]).view(adapter[key].shape)
        new[key], at = (adapter[key].double() + part).float(), at + adapter[key].numel()
    return new
