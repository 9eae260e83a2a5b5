"""`key.py NAME`: this site's identity, made here: site.key (mode 0600, stays) and NAME.pub (goes to the hub's
operator).

An ECDSA key on NIST P-384 in OpenSSH format, the kind that Flower takes. A key that is there is left as it is.
Prints the public key's fingerprint as `ssh-keygen -lf` does, to be read out over the phone.
"""

import base64
import hashlib
import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

name, private = sys.argv[1], Path("site.key")
if not private.exists():
    new = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    half = Path(f".site.key.{os.getpid()}")  # a key is whole or not there
    with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(new)
    half.rename(private)
public = (
    load_ssh_private_key(private.read_bytes(), password=None)
    .public_key()
    .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
)
Path(f"{name}.pub").write_bytes(public + f" {name}\n".encode())
digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
print("SHA256:" + base64.b64encode(digest).decode().rstrip("="))
