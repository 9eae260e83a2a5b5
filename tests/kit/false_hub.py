"""Two hubs to attack that are none: `open` carries out whatever it is told, `closed` does what the real one promises.

Both speak TLS (the open one any version, and plain HTTP as well) on loopback, and keep sites and runs that their
operator can list. An attack of scripts/access that the open one withstands, or that gets through the closed one, does
not tell what it says.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from flwr.proto import control_pb2 as control
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from benchmarks.access.attacks import Hub
from benchmarks.access.join import SITES_CALLS
from benchmarks.hostile import Authority, Door, new_key, public, server_context

JSON, HTML, MEDIA = "application/json", "text/html", "application/protobuf"
CARELESS = (
    "import socket, ssl, sys; a = dict(x[2:].split('=', 1) for x in sys.argv[1:]); tls ="
    " ssl._create_unverified_context()"
)
CAREFUL = CARELESS.replace(
    "ssl._create_unverified_context()", "ssl.create_default_context(cafile=a['root-certificates'])"
)
SAYS = (
    "; host, port = a['superlink'].split(':'); link = tls.wrap_socket(socket.create_connection((host, port)),"
    " server_hostname=host); link.sendall(b'hello')"
)


class FalseHub:
    def __init__(self, folder: Path, lets_through: bool) -> None:
        self.open, self.key = lets_through, new_key()
        self.nodes = {1: b"", 2: b"", 3: public(self.key)}
        self.offline, self.runs, self.looks = {3}, {7}, 0
        self.ca = Authority(folder, "hub")
        self.certificate = self.ca.server("127.0.0.1")
        self.tls = server_context(*self.certificate)  # here: a thread may begin when the folder is gone already
        if self.open:
            self.tls.set_ciphers("ALL:@SECLEVEL=0")
            self.tls.minimum_version = ssl.TLSVersion.TLSv1
        self.listeners = [socket.create_server(("127.0.0.1", 0), backlog=256) for _ in range(2)]
        self.port, self.operators_port = (listener.getsockname()[1] for listener in self.listeners)
        for listener in self.listeners:
            threading.Thread(target=self.serve, args=(listener,), daemon=True).start()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()

    # --- HTTP
    # ------------------------------------------------------------------------------------------------------------

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self.talk, args=(plain, listener is self.listeners[1]), daemon=True).start()

    def talk(self, plain: socket.socket, operator: bool) -> None:
        try:
            encrypted = plain.recv(1, socket.MSG_PEEK) == b"\x16"
            with self.tls.wrap_socket(plain, server_side=True) if encrypted else plain as link:
                if not self.open:
                    cut = threading.Timer(1, cut_off, [link])
                    cut.daemon = True
                    cut.start()
                for path, headers, body in self.requests(link.makefile("rb"), self.open or operator):
                    proper = path and encrypted or self.open
                    status, kind, said = self.answer(path, headers, body, operator) if proper else (400, HTML, b"")
                    link.sendall(
                        f"HTTP/1.1 {status} x\r\nContent-Type: {kind}\r\nContent-Length: {len(said)}\r\n\r\n".encode()
                        + said
                    )
                    if not self.open or headers.get("connection") == "close":
                        return
        except (OSError, ValueError):
            pass

    @staticmethod
    def requests(stream, whole: bool) -> Iterator[tuple[str, dict[str, str], bytes]]:
        """(target, "" where there is no one target, headers, body) of each request; a body of more than 1 MB is read
        where `whole`.
        """
        while line := stream.readline():
            words = line.split()
            headers = {}
            while words and (field := stream.readline().strip()):
                name, _, value = field.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
            if not words:
                continue
            body, length = b"", headers.get("content-length", "0")
            if whole and headers.get("transfer-encoding") == "chunked" and "content-length" not in headers:
                while size := int(stream.readline(), 16):
                    stream.read(size + 2)
            elif length.isdigit() and (whole or int(length) < 2**20):
                body = stream.read(int(length))
            yield words[1].decode("latin-1") if len(words) == 3 else "", headers, body

    # --- what a SuperLink does
    # -------------------------------------------------------------------------------------------

    def answer(self, path: str, headers: dict[str, str], body: bytes, operator: bool) -> tuple[int, str, bytes]:
        if not (self.open or operator):
            if path.removeprefix("/v1/fleet/") not in SITES_CALLS:
                return 404, HTML, b""
            if (
                path.endswith("/activate-node")
                and fleet.ActivateNodeRequest.FromString(body).public_key not in self.nodes.values()
            ):
                return 412, JSON, b"{}"
            if not self.is_site(headers, path, body):
                return 401, JSON, b"{}"
        if not self.open and path.startswith("/v1/runtime/"):
            return 401, JSON, b"{}"
        return 200, MEDIA, self.carry_out(path, body)

    def is_site(self, headers: dict[str, str], path: str, body: bytes) -> bool:
        """Flower's rule: a timestamp of the last 305 s, signed by the key of the node that the request names."""
        try:
            key, signature = (b64decode(headers[name]) for name in ("flwr-public-key", "flwr-signature"))
            age = (datetime.now(UTC) - datetime.fromisoformat(headers["flwr-timestamp"])).total_seconds()
            signed = -5 < age < 305 and verify_signature(
                bytes_to_public_key(key), headers["flwr-timestamp"].encode(), signature
            )
        except (KeyError, TypeError, ValueError):
            return False
        if path.endswith("/activate-node"):
            return signed
        named = fleet.DeactivateNodeRequest if path.endswith("/deactivate-node") else fleet.PullMessagesRequest
        request = named.FromString(body)
        return signed and self.nodes.get(getattr(request, "node_id", 0) or request.node.node_id) == key

    def carry_out(self, path: str, body: bytes) -> bytes:
        call = path.rsplit("/", 1)[-1]
        if call in ("register-node", "activate-node"):
            key = fleet.ActivateNodeRequest.FromString(body).public_key if b"BEGIN" in body else b"?"
            if key not in self.nodes.values():
                self.nodes[max(self.nodes) + 1] = key
            return fleet.ActivateNodeResponse(
                node_id={key: node for node, key in self.nodes.items()}[key]
            ).SerializeToString()
        if call == "list-nodes":
            nodes = [
                NodeInfo(node_id=node, status="offline" if node in self.offline else "online") for node in self.nodes
            ]
            return control.ListNodesResponse(nodes_info=nodes).SerializeToString()
        if call == "list-runs":
            return control.ListRunsResponse(
                run_dict={run: Run(status=RunStatus(status="finished")) for run in self.runs}
            ).SerializeToString()
        if call == "start-run":
            self.runs.add(max(self.runs) + 1)
            return control.StartRunResponse(run_id=max(self.runs)).SerializeToString()
        return AcquireTaskResponse(token="a task").SerializeToString() if call == "acquire-task" else b""

    # --- what can be seen inside
    # -----------------------------------------------------------------------------------------

    def inside(self, service: str, command: list[str]) -> str:
        """What a command prints in one of the hub's containers."""
        words, self.looks = " ".join(command), self.looks + 1
        much = self.looks if self.open else 0  # the open one's memory, connections and starts grow from look to look
        if command[0] == "python":
            return run(command)
        if command[0] == "ls":
            return "ran-signed ran-unsigned ran-altered ran-stranger" if self.open else "ran-signed"
        if "VmHWM" in words:
            return f"VmHWM:\t{150_000 + 5_000_000 * much} kB\n"
        if "/proc/net/tcp" in words:
            return "  0: 00000000:1F40 0100007F:0001 01\n" * (100 * much)
        assert words == "stat -c %Y /proc/1", words
        return str(much)

    def under_attack(self) -> Hub:
        """This hub with everything that scripts/access knows of its own."""
        door, address = Door("127.0.0.1", self.port, self.ca.file), f"127.0.0.1:{self.port}"
        operator = Door("127.0.0.1", self.operators_port, self.ca.file)
        others = {"superlink": f"127.0.0.1:{self.operators_port if self.open else 1}"}
        site = [sys.executable, "-c", (CARELESS if self.open else CAREFUL) + SAYS]
        return Hub(door, operator, self.key, self.inside, run, run, others, address, site)


def cut_off(link: socket.socket) -> None:
    """A client that is slow has had its second."""
    with suppress(OSError):  # gone already
        link.shutdown(socket.SHUT_RDWR)


def run(command: list[str]) -> str:
    return subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True).stdout
