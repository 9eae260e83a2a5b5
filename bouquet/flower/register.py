"""`register.py HUB_ADDRESS CA KEYS`: admit every site whose public key lies in the folder KEYS as NAME.pub.

Idempotent: a key that the hub knows already is left alone. Exit 1 when a key could not be registered.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KEY_IN_USE = "[code: 23]"  # flwr.supercore.error.ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE


def register(name: str, key: Path) -> bool:
    """Register one site's public key under its name; True when the hub knows the key afterwards."""
    command = ["flwr", "supernode", "register", str(key), "hub", "--name", name, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    known = KEY_IN_USE in done.stdout + done.stderr
    print(f"register: {name}", "known" if known else "admitted" if done.returncode == 0 else "refused", flush=True)
    if done.returncode and not known:
        print(done.stdout + done.stderr, file=sys.stderr)
    return known or done.returncode == 0


def main(address: str, ca: str, keys: str) -> int:
    """Register every KEYS/NAME.pub at the hub."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["FLWR_HOME"] = home
        connection = f"address = {json.dumps(address)}\nroot-certificates = {json.dumps(ca)}\n"
        Path(home, "config.toml").write_text(f"[superlink.hub]\n{connection}")
        known = [register(key.stem, key) for key in sorted(Path(keys).glob("*.pub"))]  # each, whatever came of others
        return int(not all(known))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
