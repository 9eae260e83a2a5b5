"""Sign the app, so that sites which pin this publisher run it, and refuse any other.

  bouquet hub sign [APP ...] [--again] [--key FILE] [--to FOLDER]

APP is a checkout (default: this one); what is signed is the bundle that `flwr run APP` sends, byte for byte. The key is
made when there is none, with publisher.pub and, for the sites, trusted.yaml beside it. Leaves: FOLDER/<SHA-256 of the
bundle>.json, the signatures of all its publishers, which the hub sends along (bouquet/flower/superlink.py). Errors:
TRUST-02.

Sites take a signature for so many days, and nothing older than what they ran (bouquet/flower/trust.py). One of half
that age is made anew here, a younger one stays; --again makes it anew in any case, to go back to an older checkout on
purpose. Several that sites run by turns are named in one command: signed in the same second, none is older than
another. A publisher on another machine signs there, and the hub copies that one file; here, without the key, the
command says how long it is good.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.supercore.primitives.asymmetric_ed25519 import (
    create_message_to_sign,
    decode_base64url,
    generate_key_pair,
    load_private_key,
    sign_message,
    verify_signature,
)

from app import bundle, files
from app.errors import BouquetError
from bouquet import audit
from bouquet.flower.trust import DAY, DAYS

Record = dict[str, Any]  # a publisher's in a file of signatures: signature (base64), signed_at (seconds)


def sign_and_tell(apps: list[Path], key: Path, to: Path, again: bool = False) -> None:
    """Sign these checkouts, and say whose signatures they are and how long they are good. Errors: TRUST-02."""
    now = int(time.time())
    public, files = sign_all([bundle.build(app) for app in apps], key, to, again, now)
    for file in files:
        print(f"sign: bundle {file.stem[:12]}  publisher {publisher_id(public)}  {fingerprint(public)}")
        audit.note(key.parent / "admitted", "signed", bundle=file.stem, publisher=publisher_id(public))
        print(f"sign: {outlook(file, publisher_id(public), now)}\nsign: {file}")


def sign_all(apps: list[bytes], key: Path, to: Path, again: bool, now: int) -> tuple[Ed25519PublicKey, list[Path]]:
    """The publisher and the bundles' files of signatures: made here, or elsewhere and still good. Errors: TRUST-02."""
    try:
        private = publisher_key(key)
    except BouquetError:
        if again or not key.with_suffix(".pub").is_file():
            raise
        public = serialization.load_ssh_public_key(key.with_suffix(".pub").read_bytes())
        if not isinstance(public, Ed25519PublicKey):
            raise
        digests = [hashlib.sha256(content) for content in apps]
        files = [to / f"{digest.hexdigest()}.json" for digest in digests]
        records = [read(file).get(publisher_id(public)) for file in files]
        both = zip(records, digests, strict=True)
        if not all(is_good(one, it.digest(), public) and is_young(one, now, DAYS) for one, it in both):
            raise
        return public, files
    return private.public_key(), [sign(content, private, to, again=again, now=now) for content in apps]


def outlook(file: Path, publisher: str, now: int) -> str:
    """How long sites will take the signature, and whether one of another bundle stands in its way."""
    at = read(file)[publisher]["signed_at"]
    until = time.strftime("%Y-%m-%d", time.gmtime(at + DAYS * DAY))
    text = f"sites take it for {int(DAYS - (now - at) / DAY)} more days, until {until}, unless SITE_TRUST_DAYS is set"
    others = (read(other).get(publisher, {}) for other in file.parent.glob("*.json") if other != file)
    if later := sum(other.get("signed_at", 0) > at for other in others):
        text += f"\nsign: {later} signed later; sites that ran such a one take this after bouquet hub sign --again"
    return text


def publisher_key(file: Path) -> Ed25519PrivateKey:
    """The publisher's key; made with its public files when neither half of it is here."""
    public, trusted = file.with_suffix(".pub"), file.with_name("trusted.yaml")
    if not file.is_file():
        if os.environ.get("BOUQUET_OPERATOR"):  # one that is made in a container goes with it
            raise closed(f"no {file.name} in the operator's container")
        if public.is_file() or trusted.is_file():
            raise BouquetError(
                "TRUST-02",
                found=f"{public if public.is_file() else trusted} without {file}",
                fix=(
                    "sign where the key is and copy the signature here, or name the key: --key FILE; "
                    f"for a new publisher remove {public.name} and {trusted.name} (every site then pins the new key)"
                ),
            )
        write_key(generate_key_pair()[0], file)
    try:
        key = load_private_key(file)
    except PermissionError as error:
        raise closed(f"{file}: {error.strerror}") from None
    line = openssh(key.public_key())
    if not public.is_file():
        write(public, f"{line} publisher\n")
    if not trusted.is_file():
        write(trusted, trust(key.public_key()))
    return key


def closed(found: str) -> BouquetError:
    """The key is on this host and not to be had here: the operator's container does not see it, or runs as somebody
    else.
    """
    fix = (
        "on the host: bouquet hub sign; without Python there, in a container that is given the key for this once:"
        ' docker compose run --rm --user "$(id -u)" --cap-add DAC_OVERRIDE -v "$PWD/certs:/bouquet/certs" -v'
        ' "$PWD/.bouquet/signatures:/bouquet/.bouquet/signatures" operator bouquet hub sign'
    )
    return BouquetError("TRUST-02", found=found, fix=fix)


def sign(content: bytes, key: Ed25519PrivateKey, to: Path, *, again: bool = False, now: int | None = None) -> Path:
    """Add this publisher's signature to the bundle's file of signatures, unless a good one is there with half of its
    time left; the file. `again`: add it all the same. now: seconds, else this host's clock."""
    digest, publisher = hashlib.sha256(content), publisher_id(key.public_key())
    file, now = to / f"{digest.hexdigest()}.json", int(time.time()) if now is None else now
    signed = read(file)
    record = signed.get(publisher)
    if again or not (is_good(record, digest.digest(), key.public_key()) and is_young(record, now, DAYS / 2)):
        signature = sign_message(key, create_message_to_sign(digest.digest(), now))
        signed[publisher] = {"signature": base64.urlsafe_b64encode(signature).rstrip(b"=").decode(), "signed_at": now}
        write(file, json.dumps(signed, indent=1) + "\n")
    return file


def read(file: Path) -> dict[str, Record]:
    """A bundle's signatures by publisher; none where there is no file, or one that nobody can read."""
    try:
        records: dict[str, Record] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return records


def is_young(record: Record | None, now: int, days: float) -> bool:
    """Whether a record is at most so old, and not from a clock that was ahead by more than a site allows."""
    return record is not None and -DAY <= now - record["signed_at"] <= days * DAY


def is_good(record: Record | None, digest: bytes, key: Ed25519PublicKey) -> bool:
    """Whether a record of a file of signatures holds, checked as a SuperNode does."""
    if not record:
        return False
    signed = create_message_to_sign(digest, record["signed_at"])
    return bool(verify_signature(key, signed, decode_base64url(record["signature"])))


def trust(*keys: Ed25519PublicKey) -> str:
    """The text of a site's trusted.yaml: the publishers whose bundles it runs, one a line."""
    return "".join(f"{publisher_id(key)}: {openssh(key)}\n" for key in keys)


def publisher_id(key: Ed25519PublicKey) -> str:
    """The name under which Flower looks a publisher up: made from the key, so that no two have the same."""
    return "fpk_" + hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def fingerprint(key: Ed25519PublicKey) -> str:
    """As `ssh-keygen -lf publisher.pub` shows it."""
    blob = base64.b64decode(openssh(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).rstrip(b"=").decode()


def openssh(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def write_key(key: Ed25519PrivateKey, file: Path) -> None:
    """The private key in OpenSSH format, mode 0600 from its first byte, and whole or not there."""
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, text, 0o600)


def write(file: Path, text: str) -> None:
    """Replace a public file in one step; the containers' user may read it."""
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    files.write(file, text, 0o644)
