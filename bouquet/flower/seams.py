"""Every place where Bouquet leans on Flower's insides, declared once.

A seam says what it is, why it is, what would make it needless, and the contract: the parameters of what is there, who
looks it up when, and what else its use takes for granted. superlink.py, supernode.py, superexec.py, serverapp.py and
database.py have what goes there, and take() of contracts.py puts it in. What is not replaced and still counted on is in
relied.py.
Enters: nothing. Leaves: the seams; `python -m bouquet.flower.seams` holds all of them against the Flower that is
installed, starts nothing, and exits 1 where one does not fit.
"""

from __future__ import annotations

import re
import sys

from bouquet.flower.contracts import (
    Seam,
    begin,
    called_with,
    fact,
    hold,
    in_order,
    path,
    says,
    take,
    uses_only,
    wrong,
)
from bouquet.flower.relied import HANDLERS, RELIED, ROUTER, TELLS_APART

__all__ = ["Seam", "begin", "check", "declared", "hold", "take"]

# --- the SuperLink ---------------------------------------------------------------------------------------------------

MAIN, SQL = "flwr.superlink.main", "flwr.supercore.sql_mixin"
KEYS = "flwr.superlink.routers.fleet.node_auth"

GET_FAB = Seam(
    f"{HANDLERS}:get_fab",
    "the answer to a site that fetches a bundle carries who signed it",
    "a `flwr run .` that sends signatures along, for --trusted-entities; Flower keeps them for its app hub alone",
    takes="request, state",
    seen=((f"{ROUTER}:fleet_get_fab", "fleet_handlers.get_fab"),),
    facts=(fact(says, f"{HANDLERS}:get_fab", "GetFabResponse(fab=fab_to_proto(fab))"),),
)
PUSH_MESSAGES = Seam(
    f"{HANDLERS}:push_messages",
    "a reply in another site's name, or of endless pieces, is refused before it is kept",
    "a SuperLink that compares a reply's src_node_id with the node that signed the request",
    takes="request, state",
    seen=((f"{ROUTER}:fleet_push_messages", "fleet_handlers.push_messages"),),
    facts=(
        fact(
            says,
            f"{KEYS}:authenticate_node",
            "get_linkstate(request).get_node_id_by_public_key(public_key) != node_id",
            "protobuf_request.node.node_id",
        ),
        fact(says, f"{MAIN}:_get_middleware", "Middleware(NodeAuthMiddleware)"),
        fact(says, f"{HANDLERS}:push_messages", "request.messages_list[0]", "request.message_object_trees[0]"),
    ),
)
SQLITE_PRAGMAS = Seam(
    f"{SQL}:SQLITE_PRAGMAS",
    "a busy database is waited for almost as long as its clients wait; Flower waits 5 s",
    "a setting of the SuperLink for SQLite's busy_timeout",
    home="flwr.supercore.constant:SQLITE_PRAGMAS",
    seen=((f"{SQL}:_set_sqlite_pragmas", "SQLITE_PRAGMAS"),),
    facts=(
        fact(
            says, f"{SQL}:_set_sqlite_pragmas", "for pragma, value in SQLITE_PRAGMAS", "f'PRAGMA {pragma} = {value};'"
        ),
        fact(says, f"{SQL}:SqlMixin.initialize", "event.listen(self._engine, 'connect', _set_sqlite_pragmas)"),
    ),
)
ERROR_TRANSLATOR = Seam(
    f"{MAIN}:http_error_translator",
    "a database that cannot be written is answered with 503, after which Flower's programs ask again",
    "a SuperLink that says 503 for an OperationalError of its database",
    takes="request, call_next",
    home="flwr.supercore.error.http:http_error_translator",
    seen=((f"{MAIN}:_get_middleware", "http_error_translator"),),
    facts=(
        fact(says, f"{MAIN}:_get_middleware", "Middleware(BaseHTTPMiddleware, dispatch=http_error_translator)"),
        fact(says, "flwr.supercore.retry.http_retry:_RETRYABLE_STATUS_CODES", "httpx.codes.SERVICE_UNAVAILABLE"),
        fact(
            says,
            "flwr.supernode.fleet_http_connection:http_request_response",
            "exc.response.status_code in (502, 503, 504)",
        ),
        fact(says, "flwr.supercore.heartbeat:make_task_heartbeat_fn_http", "httpx.codes.SERVICE_UNAVAILABLE"),
    ),
)
CONTROL_PATHS, FLEET_PATHS = "flwr.superlink.routers.control.middlewares", "flwr.superlink.routers.fleet.middlewares"
MIDDLEWARE = Seam(
    f"{MAIN}:_get_middleware",
    "a request goes past what of Flower's nine layers is about another API: a quarter of what it costs the hub",
    "layers of a router, or of a path",
    takes="",
    seen=((f"{MAIN}:create_app", "_get_middleware"),),
    facts=(
        fact(says, f"{MAIN}:create_app", "middleware=_get_middleware()"),
        fact(says, f"{CONTROL_PATHS}:_is_control_path", "path.startswith('/v1/control/')"),
        fact(says, f"{FLEET_PATHS}:FleetEventLogMiddleware", "request.url.path.startswith('/v1/fleet/')"),
        fact(says, f"{KEYS}:NodeAuthMiddleware", "request.url.path.startswith('/v1/fleet/')"),
        fact(says, ROUTER, "APIRouter(prefix='/v1/fleet'"),
    ),
)
ALEMBIC = "flwr.supercore.state.alembic.utils"
ALEMBIC_CONFIG = Seam(
    f"{ALEMBIC}:build_alembic_config",
    "migrations in a folder of any name; Flower's settings are cut at a space",
    "version_locations with a path_separator",
    takes="engine",
    seen=((f"{ALEMBIC}:_run_migration_workflow", "build_alembic_config"),),
    facts=(
        fact(says, ALEMBIC, "ALEMBIC_VERSION_TABLE = 'alembic_version'", "ALEMBIC_DIR = Path(__file__)"),
        fact(says, f"{ALEMBIC}:build_alembic_config", "'script_location'", "'sqlalchemy.url'", "'version_locations'"),
        fact(says, f"{ALEMBIC}:run_migrations", "_run_migration_workflow(engine, bind)"),
    ),
)

# --- the SuperNode ---------------------------------------------------------------------------------------------------

LOOP, FLEET = "flwr.supernode.start_client_internal", "flwr.supernode.fleet_http_client"
PULL = "flwr.supercore.inflatable.inflatable_utils"
PULLS = "max_concurrent_pulls, max_time, max_tries_per_object, initial_backoff, backoff_cap"

ANSWERS = Seam(
    f"{FLEET}:FleetHttpClient._unary_unary",
    "every answer of the hub is noted for the healthcheck",
    "a health answer of the SuperNode that says whether the hub was heard",
    takes="self, path, rpc_method, request, response_type, timeout",
    home="flwr.supercore.protobuf.client:ProtobufClient._unary_unary",
    seen=tuple(
        (f"{FLEET}:FleetHttpClient.{call}", "self._unary_unary") for call in ("PullMessages", "SendNodeHeartbeat")
    ),
    facts=(fact(says, FLEET, "class FleetHttpClient(ProtobufClient)"),),
)
ACTIVATE = Seam(
    f"{FLEET}:FleetHttpClient.ActivateNode",
    "a site that could not take leave waits until its last session has ended; Flower's SuperNode ends, and again",
    "a SuperNode that asks again, or a SuperLink that lets a key's new session end its old one",
    takes="self, request",
    seen=(("flwr.supernode.fleet_http_connection:http_request_response", "client.ActivateNode"),),
    facts=(TELLS_APART,),
)
VERIFY_FAB = Seam(
    f"{LOOP}:_verify_fab",
    "a signature counts for some time only, and no site goes back to an older bundle",
    "--trusted-entities with an age, and a memory of what ran",
    takes="fab, trusted_entities",
    seen=((f"{LOOP}:_pull_and_store_message", "_verify_fab"),),
    facts=(
        fact(in_order, f"{LOOP}:_pull_and_store_message", "_verify_fab(fab, trusted_entities)", "state.store_fab(fab)"),
        fact(says, f"{LOOP}:_verify_fab", "verif['signed_at']", "k != 'valid_license'"),
        fact(says, "flwr.supercore.fab:Fab", "hash_str: str", "content: bytes", "verifications: dict[str, str]"),
    ),
)
VERIFICATION_ERROR = Seam(
    f"{LOOP}:FAB_VERIFICATION_ERROR",
    "the hub hears why a site did not run a bundle",
    "an error reply that says more than that the check failed",
    seen=((f"{LOOP}:_pull_and_store_message", "FAB_VERIFICATION_ERROR"),),
    facts=(fact(says, LOOP, "FAB_VERIFICATION_ERROR = Error(ErrorCode.INVALID_FAB"),),
)
SUPERNODES_PROCESS = Seam(
    f"{LOOP}:subprocess",
    "messages are worked on in a process that has the libraries, and the end of the SuperExec is the SuperNode's",
    "warm executors for --isolation subprocess (1.41: Kubernetes alone), and a SuperNode that ends with it",
    seen=((f"{LOOP}:start_client_internal", "subprocess.Popen"),),
    facts=(
        fact(uses_only, LOOP, "subprocess", "Popen"),
        fact(says, f"{LOOP}:start_client_internal", "command = ['flower-superexec']", "subprocess.Popen(command)"),
    ),
)
SUPERNODES_CLOCK = Seam(
    f"{LOOP}:time",
    "within a round the hub is asked at once, not every 3 s",
    "a setting for how often a SuperNode asks",
    seen=((f"{LOOP}:start_client_internal", "time.sleep"), (f"{LOOP}:_push_messages", "time.sleep")),
    facts=(fact(uses_only, LOOP, "time", "sleep"), fact(called_with, LOOP, "time.sleep", "3", "0.5")),
)
SUPERNODES_PULL = Seam(
    f"{LOOP}:pull_objects",
    "what a message holds is looked for sooner than after a second",
    "a setting for the first wait",
    takes=f"object_ids, pull_object_fn, {PULLS}",
    home=f"{PULL}:pull_objects",
    seen=((f"{LOOP}:_pull_and_store_message", "pull_objects"),),
)
NODE_STATE, FINISH = "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState", "flwr.supernode.servicer.runtime"
FINISH_TASK = Seam(
    f"{NODE_STATE}.finish_task",
    "a ClientApp that a signal ends without a reply is answered for: Flower's SuperNode waits for ever",
    "an error reply for a failed ClientApp, as Flower has one for a failed AgentApp",
    takes="self, task_id, sub_status, details",
    seen=((f"{FINISH}.runtime_handlers:push_task_output", "state.finish_task"),),
    facts=(
        fact(
            says, f"{NODE_STATE}.finish_task", "sub_status == SubStatus.FAILED", "tasks[0].type == TaskType.AGENT_APP"
        ),
        fact(says, f"{NODE_STATE}._store_error_replies", "entry.is_retrieved", "not in replied_ids"),
        fact(says, f"{NODE_STATE}._on_task_tokens_expired", "self._store_error_replies(client_run_ids"),
        fact(says, f"{NODE_STATE}.get_messages_legacy", "entry.is_retrieved = True"),
        fact(says, f"{LOOP}:_push_messages", "while not (reply_messages := state.get_messages_legacy(is_reply=True))"),
    ),
)
DEAD_THREAD = Seam(
    "threading:excepthook",
    "a SuperNode whose heartbeat has died is offline for ever: it ends",
    "a SuperNode that ends with its heartbeat",
    seen=(("threading:_make_invoke_excepthook", "excepthook"),),
    facts=(
        fact(
            says, "flwr.supercore.heartbeat:HeartbeatSender.__init__", "threading.Thread(target=self._run, daemon=True)"
        ),
        fact(
            says, "flwr.supernode.fleet_http_connection:http_request_response", "HeartbeatSender(send_node_heartbeat)"
        ),
    ),
)

# --- a SuperExec -----------------------------------------------------------------------------------------------------

EXEC, EXECUTOR = "flwr.supercore.superexec.run_superexec", "flwr.supercore.superexec.executor.subprocess_executor"
PLUGIN, WORK = "flwr.supercore.superexec.plugin.base_exec_plugin", "flwr.supernode.runtime.run_clientapp"
SERVE, INSTALL_TAKES = "flwr.superlink.runtime.run_serverapp", "fab_file, install_dir, skip_prompt"
WARM = (
    "an executor for processes of one's own: in 1.41 --executor knows `subprocess` and Kubernetes, whose pool is warm"
)

TASK_TYPES = Seam(
    f"{PLUGIN}:AutoExecPlugin.supported_task_types",
    "no other task is asked for than those it can start",
    "a flag of flower-superexec for the kinds of task",
    seen=((f"{EXEC}:run_superexec", "plugin.supported_task_types"),),
    facts=(fact(says, "flwr.supercore.constant:TaskType", "'flwr-clientapp'", "'flwr-serverapp'"),),
)
LAUNCH_TASK = Seam(
    f"{PLUGIN}:AutoExecPlugin.launch_task",
    "which run a message is of: messages of one run share a process",
    WARM,
    takes="self, token, task",
    home=f"{PLUGIN}:BaseExecPlugin.launch_task",
    seen=((f"{EXEC}:run_superexec", "plugin.launch_task"),),
    facts=(fact(says, EXEC, "plugin = AutoExecPlugin("), fact(says, PLUGIN, "class AutoExecPlugin(BaseExecPlugin)")),
)
RECONCILE = Seam(
    f"{EXECUTOR}:SubprocessExecutor.reconcile",
    "processes that have ended or waited too long are cleared away",
    WARM,
    takes="self",
    seen=((f"{EXEC}:run_superexec", "executor.reconcile"),),
)
EXECUTORS_PROCESS = Seam(
    f"{EXECUTOR}:subprocess",
    "a message goes to a process that is there, with the libraries loaded",
    WARM,
    seen=((f"{EXECUTOR}:SubprocessExecutor.launch", "subprocess.Popen"),),
    facts=(
        fact(uses_only, EXECUTOR, "subprocess", "Popen", "DEVNULL"),
        fact(
            says,
            f"{EXECUTOR}:SubprocessExecutor.launch",
            "'--token'",
            "'--insecure'",
            "'--root-certificates'",
            "'--parent-pid'",
        ),
        fact(
            says,
            "flwr.supercore.constant",
            "TaskType.CLIENT_APP: '--runtime-api-address'",
            "TaskType.CLIENT_APP: 'flwr-clientapp'",
        ),
        fact(
            says,
            "flwr.supercore.constant",
            "TaskType.SERVER_APP: '--runtime-api-address'",
            "TaskType.SERVER_APP: 'flwr-serverapp'",
        ),
    ),
)
SUPEREXECS_CLOCK = Seam(
    f"{EXEC}:time",
    "the next message is asked for when the last one is done",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL, which asks as often when there is nothing to do",
    seen=((f"{EXEC}:run_superexec", "time.sleep"),),
    facts=(fact(uses_only, EXEC, "time", "sleep"), fact(called_with, EXEC, "time.sleep", "task_poll_interval")),
)
CLIENTAPPS_EXIT = Seam(
    f"{WORK}:flwr_exit",
    "a process that has worked on a message lives on for the next",
    WARM,
    takes="code, message, event_type, event_details, emit_telemetry",
    home="flwr.supercore.exit.exit:flwr_exit",
    seen=((f"{WORK}:run_clientapp", "flwr_exit"),),
    facts=(fact(says, "flwr.supercore.exit.exit_handler:trigger_exit_handlers", "run_before_force_exit: bool"),),
)
CLIENTAPPS_PULL = Seam(
    f"{WORK}:pull_and_inflate_object_from_tree",
    SUPERNODES_PULL.why,
    SUPERNODES_PULL.instead,
    takes=f"object_tree, pull_object_fn, confirm_object_received_fn, return_type, {PULLS}",
    home=f"{PULL}:pull_and_inflate_object_from_tree",
    seen=((f"{WORK}:pull_task_input", "pull_and_inflate_object_from_tree"),),
)
CLIENTAPPS_INSTALL = Seam(
    f"{WORK}:install_from_fab",
    "a run's log begins with what the app says, not with where Flower unpacked it, each time",
    "an install without a word",
    takes=INSTALL_TAKES,
    home="flwr.cli.install:install_from_fab",
    seen=((f"{WORK}:run_clientapp", "install_from_fab"),),
)
SERVERAPPS_INSTALL = Seam(
    f"{SERVE}:install_from_fab",
    CLIENTAPPS_INSTALL.why,
    CLIENTAPPS_INSTALL.instead,
    takes=INSTALL_TAKES,
    home=CLIENTAPPS_INSTALL.home,
    seen=((f"{SERVE}:run_serverapp", "install_from_fab"),),
)

# --- all of them -----------------------------------------------------------------------------------------------------


def declared() -> dict[str, Seam]:
    """Every seam by name."""
    ours = {name: one for name, one in globals().items() if isinstance(one, Seam)}
    return ours | {one.place: one for one in RELIED}


def check() -> dict[str, list[str]]:
    """What does not hold of all seams, by name; a fraction of a second."""
    found = {name: wrong(seam) for name, seam in declared().items()}
    everything = {file: file.read_text() for file in path("flwr").parent.rglob("*.py")}
    for name, seam in declared().items():
        module, _, attribute = seam.place.partition(":")
        if seam.ours and not seam.home and "." not in attribute and module != "threading":
            past = re.compile(rf"from [\w.]*\b{module.rpartition('.')[2]} import (\([^)]*|[^\n(]*)\b{attribute}\b")
            found[name] += [
                f"{file}: imports it by name, past ours" for file, text in everything.items() if past.search(text)
            ]
    own = re.compile(r"threading\.excepthook\s*=[^=]")
    found["DEAD_THREAD"] += [f"{file}: sets one of its own" for file, text in everything.items() if own.search(text)]
    return {name: problems for name, problems in found.items() if problems}


if __name__ == "__main__":
    gone = check()
    for name in declared():
        print("GONE" if name in gone else "ok  ", name, *(f"\n       {problem}" for problem in gone.get(name, ())))
    sys.exit(bool(gone))
