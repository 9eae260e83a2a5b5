"""Where Bouquet reads, calls or counts on Flower's insides and puts nothing of its own there; two of these the app
replaces itself, as its bundle brings no other file along.

Enters: nothing. Leaves: seams that are not `ours`, which seams.py holds against the Flower that is installed.
"""

from __future__ import annotations

from bouquet.flower.contracts import Fact, Seam, called_with, fact, in_order, says

ROUTER, HANDLERS = "flwr.superlink.routers.fleet.router", "flwr.superlink.servicer.fleet.fleet_handlers"
CALLS = (  # gateway.conf
    "register-node unregister-node activate-node deactivate-node send-node-heartbeat pull-messages push-messages "
    "get-run get-fab push-object pull-object confirm-message-received"
)
CONSTANT, STRATEGY = "flwr.common.constant", "flwr.serverapp.strategy"
GRID = "flwr.superlink.grid.http_grid"
PROGRAMS = (
    *("flwr.superlink.cli.flower_superlink:flower_superlink", "flwr.supernode.cli.flower_supernode:flower_supernode"),
    *("flwr.superlink.cli.flwr_serverapp:flwr_serverapp", "flwr.supernode.cli.flwr_clientapp:flwr_clientapp"),
    "flwr.supercore.cli.flower_superexec:flower_superexec",
)
WAY = "nothing: it is the way"
ACTIVATES = f"{HANDLERS}:activate_node"
TELLS_APART = fact(  # with a heartbeat of 0 s a key that is known is refused for that, and another for what it is
    in_order,
    ACTIVATES,
    "get_node_id_by_public_key",
    "_validate_heartbeat_interval",
    "if not state.activate_node(",
    "ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL",
    "ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED",
)


def relied(place: str, why: str, *facts: Fact, takes: str | None = None, instead: str = WAY) -> Seam:
    return Seam(place, why, instead, takes, facts=facts, ours=False)


RELIED = (
    *(relied(place, "a program of Flower's is called, and reads sys.argv", takes="") for place in PROGRAMS),
    relied(
        "flwr.supercore.logger:update_console_handler",
        "superexec.py: a SuperExec is forked when Flower's log has its level already",
        takes="level, timestamps, colored",
        instead="FLWR_LOG_LEVEL before the import",
    ),
    relied(
        "flwr.cli.build:build_fab_from_disk",
        "bundle.py: so is a bundle made, of the files that are in no hidden folder",
        fact(says, "", "build_fab_from_files(collect_files(app.expanduser().resolve()))[0]"),
        takes="app",
        instead="a build that leaves .venv and .git alone",
    ),
    relied("flwr.cli.utils:collect_files", "bundle.py: what a folder's files are called in a bundle", takes="root"),
    relied(
        ACTIVATES,
        "reach.py: a question with a heartbeat of 0 s tells a known key from an unknown one and changes nothing",
        TELLS_APART,
        instead="a call that says whether a key is admitted",
    ),
    relied(f"{CONSTANT}:TIMESTAMP_TOLERANCE", "reach.py: BEHIND", fact(says, CONSTANT, "TIMESTAMP_TOLERANCE = 300")),
    relied(f"{CONSTANT}:SYSTEM_TIME_TOLERANCE", "reach.py: AHEAD", fact(says, CONSTANT, "SYSTEM_TIME_TOLERANCE = 5")),
    relied(
        f"{CONSTANT}:HEARTBEAT_DEFAULT_INTERVAL",
        "health.py: LONGEST is two and a half; serverapp.py: a task is given out anew after one",
        fact(says, CONSTANT, "HEARTBEAT_DEFAULT_INTERVAL = 30"),
    ),
    relied(
        "flwr.supercore.error.base:ApiErrorCode",
        "control.py: a key that is known already is [code: 23]",
        fact(says, "", "PUBLIC_KEY_ALREADY_IN_USE = 23", "FORBIDDEN_ACTION"),
    ),
    relied(
        "flwr.supercore.protobuf.framing:frame_message",
        "control.py: before each message of a stream is its size, in FRAME bytes",
        fact(says, "", "len(payload).to_bytes(FRAME_HEADER_SIZE, 'big') + payload"),
        fact(says, "flwr.supercore.protobuf.constants", "FRAME_HEADER_SIZE = 4"),
        takes="message",
    ),
    relied(
        "flwr.superlink.servicer.control.control_handlers:_stream_logs",
        "control.py: a run's log goes on after a moment, to its end",
        fact(says, "", "state.get_task_log(task_id, after_timestamp)", "latest_timestamp=latest_timestamp"),
    ),
    relied(
        f"{ROUTER}:router",
        "gateway.conf: ten calls of a SuperNode pass, two stay shut",
        fact(called_with, ROUTER, "router.post", *(f"'/{call}'" for call in CALLS.split())),
    ),
    relied(
        "flwr.app.message.array:Array.inflate",
        "wire.py: no array of more than so many bytes is built out of what arrived",
        fact(says, "", "array_metadata['arraychunk_ids']", "get_object_body(object_content, cls)"),
        takes="cls, object_content, children",
        instead="a limit in Flower, which may be told to repeat one chunk a million times",
    ),
    relied(
        f"{GRID}:pull_objects",
        "bounds.py: a reply's objects are counted, and looked for sooner",
        fact(
            says, GRID, "all_object_contents = pull_objects(object_ids=", "pull_object_fn=make_pull_object_fn_protobuf"
        ),
        instead="limits of a reply in the Grid",
    ),
    *(
        relied(
            f"{STRATEGY}.{module}:{name}",
            "strategy.py: what a server optimiser remembers is kept with the run",
            fact(says, "", *(f"self.{kept}" for kept in names)),
            instead="a strategy that gives and takes its state",
        )
        for module, name, *names in (
            ("fedavgm", "FedAvgM", "momentum_vector", "current_arrays"),
            ("fedopt", "FedOpt", "m_t", "v_t", "current_arrays"),
        )
    ),
    relied(
        "flwr.supercore.inflatable.inflatable_object:iterate_object_tree",
        "superlink.py: a reply's pieces are counted one by one, not built",
        fact(says, "", "yield tree"),
        takes="tree",
    ),
    relied(f"{CONSTANT}:ErrorCode", "supernode.py: a site does not trust a bundle", fact(says, "", "INVALID_FAB")),
    relied("flwr.common.config:parse_config_args", "supernode.py: --node-config's words", takes="config, flatten"),
)
