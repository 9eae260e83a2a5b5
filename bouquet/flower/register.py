"""`register.py HUB_ADDRESS CA KEYS`: admit every site whose public key lies in the folder KEYS as NAME.pub.

Idempotent: a key that the hub knows already is left alone. Exit 1 when a key could not be registered.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from app.errors import BouquetError
from bouquet.hub import control, roster
from bouquet.hub.runs import CONNECTION


def register(name: str, key: Path) -> bool:
    """Register one site's public key under its name; True when the hub knows the key afterwards."""
    try:
        control.register(name, roster.Key.read(key).pem)
        done = "admitted"
    except BouquetError as error:
        done = "known" if control.IN_USE in error.found else "refused"
        if done == "refused":
            print(error.report(), file=sys.stderr)
    print(f"register: {name}", done, flush=True)
    return done != "refused"


def main(address: str, ca: str, keys: str) -> int:
    """Register every KEYS/NAME.pub at the hub."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLWR_HOME"] = home
        connection = f"address = {json.dumps(address)}\nroot-certificates = {json.dumps(ca)}\n"
        Path(home, "config.toml").write_text(f"[superlink.{CONNECTION}]\n{connection}")
        known = [register(key.stem, key) for key in sorted(Path(keys).glob("*.pub"))]  # each, whatever came of others
        return int(not all(known))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
