"""A stranger's tools: raw requests, signed headers, throwaway keys and certificates, and a hub that is none.

Nothing here is the project's own client: an attack that only a polite client makes is none.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.message import Message

FLEET = "/v1/fleet/"
CONTROL = "/v1/control/"
MEDIA = "application/protobuf"
Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Answer:
    """An HTTP answer; status 0 is none, and `body` is then why."""

    status: int
    kind: str
    body: bytes

    @property
    def from_superlink(self) -> bool:
        """The SuperLink answers in JSON or protobuf, a proxy in HTML, an HTTP parser in plain text."""
        return self.kind.startswith("application/")

    def __str__(self) -> str:
        if self.kind == "application/json":
            said = json.loads(self.body or b"{}").get("detail", "")
        else:
            said = "" if self.status else self.body.decode()
        return f"{self.status or ''} {said}".strip()


@dataclass(frozen=True)
class Door:
    """The address that the world sees, and the CA that proves it."""

    host: str
    port: int
    ca: Path

    def connect(self, timeout: float = 10, tls: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        plain = socket.create_connection((self.host, self.port), timeout)
        return (tls or ssl.create_default_context(cafile=str(self.ca))).wrap_socket(plain, server_hostname=self.host)

    def raw(self, request: bytes, wait: float = 3) -> bytes:
        """Send bytes as they are; everything that comes back until the other side closes or is silent for `wait`
        seconds.
        """
        return exchange(self.connect, request, wait)

    def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}) -> Answer:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Connection: close",
            f"Content-Length: {len(body)}",
        ]
        lines += [f"{name}: {value}" for name, value in {"Content-Type": MEDIA, **headers}.items()]
        answers = parse(self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body, wait=20))
        return answers[0] if answers else Answer(0, "", b"no answer")

    def call(self, path: str, message: Message, headers: Mapping[str, str] = {}) -> Answer:
        return self.send("POST", path, message.SerializeToString(), headers)


def exchange(connect, request: bytes, wait: float) -> bytes:
    got = b""
    try:
        with connect() as link:
            link.settimeout(wait)
            link.sendall(request)
            while more := link.recv(65536):
                got += more
    except OSError:  # reset, closed or silent: what came before that is the answer
        pass
    return got


def parse(stream: bytes) -> list[Answer]:
    """The HTTP answers in a stream, in order; bodies by Content-Length (a chunked one is taken to the end)."""
    answers = []
    while stream.startswith(b"HTTP/"):
        head, _, stream = stream.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        interim = status.split()[1].startswith("1")  # 100 Continue has no body, and the answer comes behind it
        length = 0 if interim else int(headers.get("content-length", len(stream)))
        if not interim:
            answers.append(Answer(int(status.split()[1]), headers.get("content-type", ""), stream[:length]))
        stream = stream[length:]
    return answers


# --- keys
# --------------------------------------------------------------------------------------------------------------------


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def public(key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(key: Key, claims: Key | None = None, age: float = 0) -> dict[str, str]:
    """The headers of a SuperNode's call, signed `age` seconds ago; `claims`: whose public key they say it is."""
    timestamp = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    signature = key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": b64encode(public(claims or key)).decode(), "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(signature).decode(),
    }  # fmt: skip


# --- certificates and a hub that is none
# -------------------------------------------------------------------------------------


class Authority:
    """A CA for one test, in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.key = folder, new_key()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(*[False] * 5, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
        builder = (
            self._builder(self.name, self.key, -1, 10)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
        )
        self.file = folder / f"{name}.crt"
        self.file.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: Key, start: int, end: int) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + timedelta(days=start)).not_valid_after(now + timedelta(days=end))
        )  # fmt: skip

    def server(self, name: str, days: tuple[int, int] = (-1, 5)) -> tuple[str, str]:
        """(certificate, key) of a server of that name, as files; valid from..to days from now."""
        key = new_key()
        address = x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        builder = self._builder(x509.Name([]), key, *days).add_extension(x509.SubjectAlternativeName([address]), True)
        files = [self.folder / f"{builder._serial_number}.{end}" for end in ("crt", "key")]
        files[0].write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        pkcs8 = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *pkcs8))
        return str(files[0]), str(files[1])


@dataclass
class Impostor:
    """A TLS server on loopback that says it is a hub, and notes what a client tells it."""

    tls: ssl.SSLContext
    heard: list[bytes] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __enter__(self) -> Impostor:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            plain.settimeout(5)
            try:
                with self.tls.wrap_socket(plain, server_side=True) as link:
                    self.heard.append(link.recv(4096))
            except OSError as error:
                self.refused.append(getattr(error, "reason", None) or type(error).__name__)

    def wait(self, seconds: float) -> None:
        """Until somebody has come, one way or the other."""
        end = time.monotonic() + seconds
        while not any(self.heard) and not self.refused and time.monotonic() < end:
            time.sleep(0.1)


def server_context(certificate: str, key: str) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    return tls


def of_version(tls: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """That context, speaking one TLS version alone, however old."""
    tls.set_ciphers("ALL:@SECLEVEL=0")
    tls.minimum_version = tls.maximum_version = version
    return tls


def anybody() -> ssl.SSLContext:
    """A client that believes every server."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    return tls


# --- many connections
# --------------------------------------------------------------------------------------------------------


def stream_body(door: Door, head: bytes, size: int, chunked: bool = False) -> tuple[int, Answer]:
    """Send a body of `size` bytes until somebody objects; (bytes sent, the answer)."""
    block = bytes(65536)
    frame = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    sent, got, link = 0, b"", door.connect()
    try:
        link.sendall(head)
        while sent < size and not got:
            link.sendall(frame)
            sent += len(block)
            got = waiting(link)
        if chunked and sent >= size:
            link.sendall(b"0\r\n\r\n")
        link.settimeout(60)
        answers = parse(got or link.recv(65536))
    except OSError as error:
        return sent, Answer(0, "", type(error).__name__.encode())
    finally:
        link.close()
    return sent, answers[0] if answers else Answer(0, "", b"closed")


def waiting(link: ssl.SSLSocket) -> bytes:
    """What the other side has said already; a TLS record alone (a session ticket) is nothing."""
    if not (link.pending() or select.select([link], [], [], 0)[0]):
        return b""
    timeout = link.gettimeout()
    link.settimeout(0)
    try:
        return link.recv(65536) or b"closed"
    except ssl.SSLWantReadError:
        return b""
    finally:
        link.settimeout(timeout)


def drip(
    door: Door, heads: Iterable[bytes], seconds: float, meanwhile: Callable[[], object]
) -> tuple[list[float], object]:
    """One connection a head: send it, then a byte a second, for `seconds`.

    Returns: for each connection the seconds until it was closed or answered (`seconds` when it never was), and what
    `meanwhile` returned, which is called once, when all of them have been open for a while.
    """
    links = []
    for head in heads:
        links.append(door.connect())
        links[-1].sendall(head)
        links[-1].settimeout(0)
    ended: dict[int, float] = {}
    started, seen = time.monotonic(), None
    while (now := time.monotonic() - started) < seconds:
        if now > seconds / 4 and seen is None:
            seen = meanwhile()
        for index in set(range(len(links))) - set(ended):
            try:
                links[index].recv(4096)  # an answer, or the end
                ended[index] = now
            except ssl.SSLWantReadError:  # still open
                links[index].send(b"x")
            except OSError:
                ended[index] = now
        time.sleep(1)
    for link in links:
        link.close()
    return [ended.get(index, seconds) for index in range(len(links))], seen
