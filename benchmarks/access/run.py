"""Attacks on what is run: runs and tasks of strangers at the hub, and code that no publisher signed at the sites."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from functools import cache

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import StartRunRequest, StartRunResponse
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse

from benchmarks.access.attacks import Hub, Result, attack
from benchmarks.hostile import CONTROL, Answer, Door
from bouquet.hub.sign import publisher_id, sign

LONGEST = 900.0  # seconds for runs that end by themselves in ten: their processes may have to wait for the processor
IDLE = b"from flwr.serverapp import ServerApp\napp = ServerApp()\n@app.main()\ndef main(grid, context):\n    pass\n"
# A hub's half that asks each site once, and a site's half that leaves a file behind where it ran.
WITNESS = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
LONGEST, app, client = SECONDS, ServerApp(), ClientApp()
@client.query()
def query(message, context):
    open("/tmp/ran-NAME", "w").close()
    return Message(RecordDict(), reply_to=message)
@app.main()
def main(grid, context):
    asked = [Message(RecordDict(), dst_node_id=site, message_type="query", ttl=LONGEST) for site in SITES]
    replies = list(grid.send_and_receive(asked, timeout=LONGEST))
    raise RuntimeError("; ".join(sorted(reply.error.reason if reply.has_error() else "a reply" for reply in replies)))
"""


def an_app(code: bytes, client: str = "app") -> bytes:
    """The bundle of a Flower app with this code."""
    table = (
        "[tool.flwr.app]\npublisher = 'nobody'\n[tool.flwr.app.components]\nserverapp = 'one:app'\nclientapp ="
        f" 'one:{client}'\n"
    )
    project = "[project]\nname = 'one'\nversion = '1.0.0'\nlicense = 'Apache-2.0'\ndependencies = ['flwr>=1.41']\n"
    return build_fab_from_files({"pyproject.toml": (project + table).encode(), "one.py": code})[0]


def start_run(door: Door, app: bytes) -> Answer:
    return door.call(
        CONTROL + "start-run", StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app))
    )


@attack("run", "start-run from outside, with nothing but the CA file")
def starts_a_run(hub: Hub) -> Result:
    answer = start_run(hub.door, an_app(IDLE))
    return Result.of(answer.status == 200, answer)


@attack("run", "acquire-task without the secret, from outside")
def steals_a_task(hub: Hub) -> Result:
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    for _ in range(3):  # the hub's own executor asks twice a second
        start_run(hub.door, an_app(IDLE))
        for _ in range(20):
            answer = hub.door.call("/v1/runtime/acquire-task", request)
            if answer.status == 200 and (task := AcquireTaskResponse.FromString(answer.body)).token:
                return Result.of(True, f"{answer}, a task's token of {len(task.token)} characters")
            if answer.status >= 400:
                return Result.of(False, answer)
    return Result.of(False, answer)


@attack(
    "run", "acquire-task without the secret, at the SuperLink itself (ours: from the hub host's loopback)", "operator"
)
def steals_a_task_inside(hub: Hub) -> Result:
    """Who is on the hub's host itself: the secret alone stands in the way."""
    answer = hub.operator.call("/v1/runtime/acquire-task", AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    return Result.of(answer.status == 200, answer)


# --- code that no publisher signed: the hub itself, or who has taken it, starts the run
# ----------------------------------------


def bundles(hub: Hub) -> dict[str, bytes]:
    """Bundles to run at the hub's sites, by what is wrong with them; the signatures that a hub would pass them off with
    lie where it takes them from.
    """
    apps = {
        name: WITNESS.replace("NAME", name).replace("SITES", repr(sorted(hub.own))).replace("SECONDS", repr(LONGEST))
        for name in ("signed", "unsigned", "stranger")
    }
    apps["altered"] = apps["signed"].replace("ran-signed", "ran-altered")
    made = {name: an_app(code.encode(), "client") for name, code in apps.items()}
    if hub.publisher and hub.signatures:
        good = sign(made["signed"], hub.publisher, hub.signatures)
        shutil.copy(good, good.with_name(f"{hashlib.sha256(made['altered']).hexdigest()}.json"))
        stranger = Ed25519PrivateKey.generate()
        file = sign(made["stranger"], stranger, hub.signatures)
        record = json.loads(file.read_text())[publisher_id(stranger.public_key())]
        file.write_text(json.dumps({publisher_id(key.public_key()): record for key in (stranger, hub.publisher)}))
    return made


@cache
def ran(hub: Hub) -> dict[str, tuple[int, str]]:
    """Each of bundles(), run by the hub's operator, all at once: (sites where it ran, what the hub was told)."""
    runs = {}
    for name, app in bundles(hub).items():
        answer = start_run(hub.operator, app)
        assert answer.status == 200, f"the hub's operator must be let in: {answer}"
        runs[name] = StartRunResponse.FromString(answer.body).run_id
    hub.started |= set(runs.values())
    end = time.monotonic() + LONGEST
    while any(hub.runs()[run][0] != "finished" for run in runs.values()) and time.monotonic() < end:
        time.sleep(1)
    left = "\n".join(hub.inside(site, ["ls", "/tmp"]) for site in ("supernode-1", "supernode-2")).split()
    told = {name: hub.runs()[run][1].removeprefix("ServerApp failed with exception: ") for name, run in runs.items()}
    return {name: (left.count(f"ran-{name}"), told[name]) for name in runs}


def runs_at_sites(hub: Hub, name: str) -> Result:
    found = ran(hub)
    assert found["signed"][0] == 2, f"what the sites' own publisher signed must run at both: {found}"
    sites, told = found[name]
    return Result.of(sites, f"ran at {sites} of 2 sites; the hub was told: {told or 'nothing'}")


@attack("trust", "an unsigned bundle, run by whoever has the hub", "operator", "inside")
def runs_unsigned(hub: Hub) -> Result:
    return runs_at_sites(hub, "unsigned")


@attack(
    "trust", "a signed bundle with a word altered, passed off with the signature of the true one", "operator", "inside"
)
def runs_altered(hub: Hub) -> Result:
    return runs_at_sites(hub, "altered")


@attack("trust", "a bundle that a stranger signed, also under the publisher's name", "operator", "inside")
def runs_a_strangers(hub: Hub) -> Result:
    return runs_at_sites(hub, "stranger")
