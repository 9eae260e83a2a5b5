"""Attacks on the door: other paths and other spellings of them, two requests in one, TLS, and what else of the hub
takes a connection.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from benchmarks.access.attacks import Hub, Result, attack
from benchmarks.access.join import SITES_CALLS
from benchmarks.access.spellings import ALLOWED, LIST, REQUEST_LINES, SMUGGLING, SPELLINGS, post
from benchmarks.hostile import (
    FLEET,
    Answer,
    Authority,
    Door,
    Impostor,
    anybody,
    exchange,
    new_key,
    of_version,
    parse,
    server_context,
)
from bouquet import ROOT
from bouquet.hub.deployment import end_group, free_port
from bouquet.hub.runs import QUIET

# --- paths
# -------------------------------------------------------------------------------------------------------------------


def at_once(work: Callable, items: Sequence, width: int = 8) -> list:
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(work, items))


def answered_by_superlink(answers: list[Answer]) -> Result:
    reached = [answer for answer in answers if answer.from_superlink or answer.status in (200, 307)]
    others = ", ".join(
        sorted({str(answer.status or answer.body.decode()) for answer in answers if answer not in reached})
    )
    return Result.of(
        reached, f"{len(reached)} of {len(answers)} reached the SuperLink" + (f", else {others}" if others else "")
    )


@attack("path", "every Control and Runtime call, and a SuperNode's register-node and unregister-node, by name")
def every_call(hub: Hub) -> Result:
    """Bodies that are no protobuf: whoever is answered has reached the SuperLink, and nothing is done."""
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES if path.removeprefix(FLEET) not in SITES_CALLS]
    return answered_by_superlink([hub.door.send("POST", path, b"\xff") for path in paths])


@attack("path", "/docs, /openapi.json, /redoc, /health, /")
def documentation(hub: Hub) -> Result:
    return answered_by_superlink(
        [
            hub.door.send(method, path)
            for path in ("/docs", "/openapi.json", "/redoc", "/health", "/")
            for method in ("GET", "HEAD")
        ]
    )


@attack(
    "path", f"{len(SPELLINGS)} spellings of a path: %2f, .., //, ;, \\, %00, case, double encoding, query, fragment"
)
def spellings(hub: Hub) -> Result:
    """The request target goes out as it is written here; an empty message is a valid list-runs."""
    return answered_by_superlink([hub.door.send("POST", path) for path in SPELLINGS])


@attack(
    "path",
    f"{len(REQUEST_LINES)} request lines: absolute URI, HTTP/1.0, 0.9, bare LF, two hosts, override headers, h2c,"
    " CONNECT",
)
def request_lines(hub: Hub) -> Result:
    streams = at_once(lambda request: hub.door.raw(request, wait=1), REQUEST_LINES)
    return answered_by_superlink([(parse(stream) or [Answer(0, "", b"closed")])[0] for stream in streams])


@attack(
    "path",
    f"smuggling and pipelining: a Control call behind an allowed one, {len(SMUGGLING)} ways of ending the first twice",
)
def smuggling(hub: Hub) -> Result:
    """An allowed call without a signature is answered 401; whatever is answered 200 is the smuggled one."""
    answers = [
        answer
        for stream in at_once(lambda request: hub.door.raw(request, wait=1), SMUGGLING)
        for answer in parse(stream)
    ]
    done = sum(answer.status == 200 for answer in answers)
    return Result.of(
        done,
        f"{done} of {len(SMUGGLING)} Control calls were carried out; answers"
        f" {sorted({answer.status for answer in answers})}",
    )


# --- transport
# ---------------------------------------------------------------------------------------------------------------


@attack("TLS", "plain HTTP on the public port")
def plain_http(hub: Hub) -> Result:
    stream = exchange(
        lambda: socket.create_connection((hub.door.host, hub.door.port), 5), post(LIST) + post(ALLOWED), wait=3
    )
    answer = (parse(stream) or [Answer(0, "", b"connection closed")])[0]
    return Result.of(
        answer.from_superlink, answer if answer.status == 0 else f"{answer.status} from the TLS listener itself"
    )


@attack("TLS", "TLS 1.0 and TLS 1.1")
def old_tls(hub: Hub) -> Result:
    spoken = []
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        with tempfile.TemporaryDirectory() as folder:  # is this machine able to speak it at all?
            certificate = Authority(Path(folder), "old").server("127.0.0.1")
            with Impostor(of_version(server_context(*certificate), version)) as old:
                Door("127.0.0.1", old.port, hub.door.ca).connect(tls=of_version(anybody(), version)).close()
        try:
            with hub.door.connect(tls=of_version(anybody(), version)) as link:
                spoken.append(link.version())
        except OSError as error:
            why = getattr(error, "reason", None) or type(error).__name__
    return Result.of(spoken, ", ".join(map(str, spoken)) or why)


@attack("TLS", "the site's side: a hub with a wrong CA, an expired certificate, a wrong SAN", "supernode")
def false_hub(hub: Hub) -> Result:
    """A real SuperNode that trusts one CA, against four hubs; the good one proves that it would have talked."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        right, wrong = (Authority(Path(folder), name) for name in ("right", "wrong"))
        certificates = {
            "good": right.server("127.0.0.1"), "wrong CA": wrong.server("127.0.0.1"),
            "expired": right.server("127.0.0.1", (-9, -1)), "wrong SAN": right.server("hub.example.org"),
        }  # fmt: skip
        hubs = {name: stack.enter_context(Impostor(server_context(*files))) for name, files in certificates.items()}
        key = Path(folder, "site.key")
        key.write_bytes(
            new_key().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            )
        )
        for each in hubs.values():
            command = [
                *hub.supernode,
                f"--superlink=127.0.0.1:{each.port}",
                f"--root-certificates={right.file}",
                "--isolation=process",
                f"--port={free_port()}",
            ]
            env = os.environ | QUIET | {"FLWR_HOME": folder, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(
                [part.replace("SITE_KEY", str(key)) for part in command], env=env, cwd=folder, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            stack.callback(lambda process=process: (end_group(process.pid), process.wait()))
        for each in hubs.values():
            each.wait(45)
        assert any(hubs["good"].heard), "the SuperNode must talk to a hub with a good certificate"
        false = {name: each for name, each in hubs.items() if name != "good"}
        told = [name for name, each in false.items() if any(each.heard)]
        assert told or all(each.refused for each in false.values()), {
            name: each.refused for name, each in false.items()
        }
        return Result.of(
            told, f"told {told}" if told else "; ".join(f"{name}: {each.refused[0]}" for name, each in false.items())
        )


# --- networks
# ------------------------------------------------------------------------------------------------------------------

# One path of each kind, and what a stranger may reach of each: nothing but a SuperNode's calls at the public door.
KINDS = (
    "POST " + ALLOWED,
    "POST " + LIST,
    "POST /v1/runtime/acquire-task",
    "POST /v1/fleet/register-node",
    "GET /docs",
    "GET /openapi.json",
    "GET /health",
)


def probe(targets: dict[str, str], calls: Sequence[str] = KINDS) -> list[str]:
    """The command that runs probe.py in a container."""
    return [
        "python",
        "-c",
        (ROOT / "benchmarks/access/probe.py").read_text(),
        json.dumps({"targets": targets, "calls": list(calls)}),
    ]


def only_the_door(seen: dict, door: str) -> Result:
    """seen: probe.py's answer. Got through: an address but `door` took a connection, or the SuperLink answered another
    call there.
    """
    calls = seen[door] if isinstance(seen[door], dict) else {}
    assert calls.get(KINDS[0]), f"the public door itself must answer from there: {seen}"
    open_ = [name for name, answer in seen.items() if name != door and isinstance(answer, dict)]
    answered = [call for call, (_, superlink) in calls.items() if superlink]
    reached = ", ".join(call.split()[1] for call in answered)
    got = f"answered: {reached}; other addresses that connect: {', '.join(open_) or 'none'} of {len(seen) - 1}"
    return Result.of(open_ or set(answered) - {KINDS[0]}, got)


@attack(
    "network",
    "from a container on a network that is none of the hub's: every address and every kind of path",
    "elsewhere",
    "others",
)
def from_elsewhere(hub: Hub) -> Result:
    return only_the_door(
        json.loads(hub.elsewhere(probe({"door": f"{hub.door.host}:{hub.door.port}"} | hub.others))), "door"
    )


@attack("network", "from a site's own container: every address and every kind of path", "inside", "others")
def from_a_site(hub: Hub) -> Result:
    return only_the_door(json.loads(hub.inside("supernode-1", probe({"door": hub.from_site} | hub.others))), "door")
