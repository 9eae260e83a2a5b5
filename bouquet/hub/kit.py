"""A site's join kit: what it needs to find this hub, to prove it, and to run one SuperNode. No secret is in it.

Enters: the site's name; .env (HUB_HOST, HUB_PORT, IMAGE or TORCH, MODELS), certs/ca.crt, the base model. Leaves:
.bouquet/kits/NAME/ and NAME.tar.gz, the same bytes for the same hub, whenever and by whomever it is made.
Errors: JOIN-01 (no address), JOIN-14 (nowhere to put it), CERT-01 (the certificate lacks it), CERT-03 (no CA),
CERT-05, HOST-14, HOST-15, MODEL-01 to -03, MODEL-05, TRUST-02.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import ipaddress
import os
import string
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from app.errors import BouquetError
from bouquet import ROOT, dotenv

KITS = ROOT / ".bouquet" / "kits"
TEMPLATES = ROOT / "docker" / "kit"
CERTS = ROOT / "certs"


def make(name: str, hub: str | None = None) -> tuple[Path, str]:
    """Write the kit; (archive, its SHA-256)."""
    facts = {"SITE_NAME": name, "HUB": named(hub) if hub else address(), "IMAGE": image(), **base_model()}
    check_certificate(facts["HUB"].rpartition(":")[0])
    files = {file.name: file.read_bytes() for file in TEMPLATES.iterdir() if file.is_file()}
    files["README.md"] = string.Template(files["README.md"].decode()).substitute(facts).encode()
    files[".env"] = (
        "# From the hub; ./site init adds this site's own settings.\n"
        + "".join(f"{k}='{v}'\n" for k, v in facts.items())
    ).encode()
    files["ca.crt"], files["trusted.yaml"] = ca(), trusted()
    files["site"], files["env.awk"] = (ROOT / "scripts" / "site").read_bytes(), dotenv.READER.read_bytes()
    archive = KITS / f"{name}.tar.gz"
    try:
        KITS.mkdir(parents=True, exist_ok=True)
        if not (KITS / name / "site.key").exists():  # else somebody has set this kit up where it lies
            for folder in (KITS / name, KITS / name / "models"):
                folder.mkdir(exist_ok=True)
                if folder.is_symlink():
                    raise OSError(f"{folder} is a link")
                hand_over(folder)
            for file, content in files.items():
                place(KITS / name / file, content, mode_of(file))
        place(archive, packed(name, files), 0o644)
    except OSError as error:
        fix = (
            "make room on the disk, or the folder writable for the user that runs this; for the operator's container:"
            " scripts/setup"
        )
        raise BouquetError("JOIN-14", found=f"{KITS}: {error.strerror or error}", fix=fix) from None
    return archive, hashlib.sha256(archive.read_bytes()).hexdigest()


def place(file: Path, content: bytes, mode: int) -> None:
    """A new file in place of what was there, whole or not at all; never through a link, as the operator's container
    writes here too.
    """
    half = file.with_name(f".{file.name}.half")
    half.unlink(missing_ok=True)  # of an invitation that was cut off
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as out:
            out.write(content)
            os.fchmod(out.fileno(), mode)  # whatever the umask is
            os.fsync(out.fileno())
        hand_over(half)
        half.replace(file)
    except OSError:
        half.unlink(missing_ok=True)  # the disk is full: what is there stays
        raise


def hand_over(path: Path) -> None:
    """Where root makes a kit, it is its folder's owner's, who may make it again: mostly the operator's container."""
    if os.geteuid() == 0:
        os.chown(path, KITS.stat().st_uid, KITS.stat().st_gid, follow_symlinks=False)


def packed(name: str, files: Mapping[str, bytes]) -> bytes:
    """NAME/, an empty NAME/models/ and the files as .tar.gz, without owners and times."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for folder in (name, f"{name}/models"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for file in sorted(files):
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size, entry.mode = len(files[file]), mode_of(file)
            archive.addfile(entry, io.BytesIO(files[file]))
    return gzip.compress(tar.getvalue(), mtime=0)


def mode_of(file: str) -> int:
    return 0o755 if file == "site" else 0o644


def setting(key: str, default: str = "") -> str:
    """The environment's value, else .env's, else the default."""
    return dotenv.setting(ROOT, key, default)


def address() -> str:
    """HOST:PORT by which sites reach the hub. Errors: JOIN-01, CERT-05, HOST-15."""
    if not (hosts := dotenv.hosts(setting("HUB_HOST"))):
        fix = (
            "put the hub's public name into .env, HUB_HOST=hub.example.org, then: scripts/certs; or name it: --hub"
            " HOST:PORT"
        )
        raise BouquetError("JOIN-01", found="no HUB_HOST", fix=fix)
    return f"[{hosts[0]}]:{port()}" if ":" in hosts[0] else f"{hosts[0]}:{port()}"


def named(hub: str) -> str:
    """HOST:PORT as a person writes it. Errors: CERT-05, HOST-15."""
    host, _, number = hub.strip().rpartition(":")
    bare = dotenv.host(host or number, "--hub")
    return f"[{bare}]:{dotenv.port(number, '--hub')}" if ":" in bare else f"{bare}:{dotenv.port(number, '--hub')}"


def port() -> str:
    return str(dotenv.port(setting("HUB_PORT", "8443"), "HUB_PORT"))


def image() -> str:
    """As compose.yaml names it."""
    return setting("IMAGE") or f"{setting('COMPOSE_PROJECT_NAME', 'bouquet')}:{setting('TORCH', 'cuda')}"


def base_model() -> dict[str, str]:
    """Name and fingerprint of the base model that a run takes unless told otherwise."""
    from app import bases, families, model

    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]["base-model"]
    models = Path(os.environ.get("BOUQUET_MODELS") or dotenv.path(ROOT, setting("MODELS", "models")))
    # of a kind that can't be trained, no site should get the fingerprint
    families.check(folder := bases.locate(name, models))
    return {"BASE_MODEL": name, "BASE_FINGERPRINT": model.fingerprint(folder)["base"]}


def ca() -> bytes:
    """The CA's certificate: of this checkout, or where Compose mounts it. Errors: CERT-03."""
    for file in (CERTS / "ca.crt", Path("/ca.crt")):
        if file.is_file():
            return file.read_bytes()
    raise BouquetError("CERT-03", found=f"no {CERTS / 'ca.crt'}", fix="run scripts/certs")


def trusted() -> bytes:
    """The publishers whose signed code the site runs; a hub that has none yet becomes one."""
    from bouquet.hub.sign import publisher_key

    if not (file := CERTS / "trusted.yaml").is_file():
        publisher_key(CERTS / "publisher.key")
    return file.read_bytes()


def check_certificate(host: str) -> None:
    """The hub's certificate, where it lies here, has the host's name. Errors: CERT-01."""
    from cryptography import x509

    if not (file := CERTS / "superlink.crt").is_file():
        return
    names = (
        x509.load_pem_x509_certificate(file.read_bytes())
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    if canonical(host) not in {canonical(str(name.value)) for name in names}:
        fix = "add it to HUB_HOST in .env, then: scripts/certs && docker compose restart superlink gateway"
        raise BouquetError("CERT-01", found=f"missing: {host}", fix=fix)


def canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return host.lower()
