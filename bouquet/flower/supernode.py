"""A SuperNode that says whether the hub answers it, and whose process ends when it can do nothing any more.

Flower's SuperNode keeps its HTTP thread when its message loop has died of one bad answer from the hub: the process
lives, answers "healthy", and is offline for ever; so it does when its heartbeat has died; and it stays online and idle
when its SuperExec has. Here the end of any of them is the end of the process, whoever started it can start it again,
and every answer of the hub is noted in the file BOUQUET_HEARD for the healthcheck (health.py heard:FILE). Where the
hub still has the site's last session, as it could not take leave, Flower's SuperNode ends, and is started again until
that session is over; here it waits. Flower verifies who signed a bundle; how long ago that may be is judged here
(trust.py).
Enters: flower-supernode's own arguments; $NAME in one of them is that environment variable; SITE_TRUST_DAYS.
Leaves: its exit code, 1 when the loop raised.
How all of that is put into Flower: seams.py.
Errors: TRUST-04, -05, SITE-12 and FLWR-01 at the start; for a bundle that is not run those of trust.py.
"""

import argparse
import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import httpx
import yaml
from flwr.app.error import Error
from flwr.common.config import parse_config_args
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supernode.cli import flower_supernode

from bouquet.flower import seams, superexec, trust

LEAST = 0.1  # seconds between two questions to the hub, at least; at most Flower's own
LOOK = 0.05  # seconds between two looks for its own ClientApp's reply, which costs next to nothing
SHARE = 0.05  # of the time since it last worked: the longer it has been idle, the less often it asks
# A message is there before what is in it; Flower looks again after 1 s, 2 s, … up to 10, 500 times, for two hours at
# most.
SOON = {"initial_backoff": LEAST, "backoff_cap": 1.0, "max_tries_per_object": None}
IDLE = 3.0  # seconds: what Flower's SuperNode sleeps when there is no message
# A last session lives on for up to 66 s after the hub has heard of it last: for so many seconds, so many apart, a site
# asks whether it has ended, and is refused as by Flower after that: then somebody else has its key.
OVER, AGAIN = 90.0, 2.0
WAITS = "bouquet: waiting until the hub has ended this site's last session, up to 66 s"
TAKEN = "bouquet: the hub still has a session of this site: its key is in use elsewhere"
TURNED_AWAY = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED  # a key that the hub does not know, or has a session of
GOODBYE = 5.0  # seconds that a SuperNode which is being ended itself has for taking leave of the hub


def note_answers(file: Path) -> None:
    """Touch `file` after every call that the hub answered well."""

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def noted(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            file.touch()
            return answer

        return noted

    seams.take(seams.ANSWERS, noting)


def outlast_the_last_session() -> None:
    """While the hub has the site's last session still, ask again until that is over: Flower's SuperNode would end."""
    since: float | None = None

    def patiently(activate: Callable[..., Any]) -> Callable[..., Any]:
        def is_admitted(client: Any, key: bytes) -> bool:
            """As reach.py asks: without a heartbeat a key that the hub knows is refused for that, and nothing else.
            Errors: an answer of another kind, which Flower may ask again after.
            """
            try:
                activate(client, ActivateNodeRequest(public_key=key, heartbeat_interval=0))
            except httpx.HTTPStatusError as error:
                if code(error) in (ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL, TURNED_AWAY):
                    return code(error) != TURNED_AWAY
                raise
            raise AssertionError("the hub took a heartbeat of 0 s")

        @wraps(activate)
        def activated(self: Any, request: ActivateNodeRequest) -> Any:
            nonlocal since
            while True:
                try:
                    answer = activate(self, request)
                    since = None
                    return answer
                except httpx.HTTPStatusError as error:
                    if code(error) != TURNED_AWAY or not is_admitted(self, request.public_key):
                        raise
                    if since is None:
                        since = time.monotonic()
                        print(WAITS, flush=True)
                    if time.monotonic() - since > OVER:
                        print(TAKEN, flush=True)
                        raise
                time.sleep(AGAIN)

        return activated

    seams.take(seams.ACTIVATE, patiently)


def code(error: httpx.HTTPStatusError) -> int:
    """Which of Flower's errors the hub answered; 0 for another answer."""
    answered = FlowerError.from_json(error.response.text)
    return int(answered.code) if answered else 0


def limit_trust(arguments: list[str]) -> Callable[[], None]:
    """Where the site pins publishers, run nothing of theirs that is too old; end here where that cannot be promised.
    Leaves: what begins that.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--trusted-entities", type=Path)
    options.add_argument("--node-config", default="")
    own = options.parse_known_args(arguments)[0]
    file = own.trusted_entities
    if not file or not file.is_file():
        return lambda: None  # nothing is asked for, or Flower ends it
    if not (pinned := yaml.safe_load(file.read_text())):  # Flower takes that for no check wanted, and runs any code
        fix = "put the hub's trusted.yaml there"
        sys.exit(str(trust.Refusal("TRUST-05", "The site pins no publisher.", f"{file} is empty", fix)))
    if isinstance(limit := trust.days(os.environ.get("SITE_TRUST_DAYS", "")), trust.Refusal):
        sys.exit(str(limit))
    if not (cache := parse_config_args([own.node_config]).get("cache-path")):
        found, fix = "no cache-path in --node-config", "start it with --node-config 'cache-path=\"…\" …'"
        sys.exit(str(trust.Refusal("SITE-12", "The site does not say where its data are.", found, fix)))
    memory = Path(cache) / trust.MEMORY

    def begin() -> None:
        judge_age(memory, limit)
        print(f"trust: bundles signed within {limit} days by {', '.join(map(str, pinned))}", flush=True)
        print(f"trust: none signed before the newest that ran here, {memory}", flush=True)

    return begin


def judge_age(memory: Path, limit: int) -> None:
    """From now on Flower's check of a bundle also asks for its age, and the hub hears what was wrong."""

    def with_age(verify: Callable[..., bool]) -> Callable[..., bool]:
        def good(fab: Fab, publisher: str, key: str) -> int | None:
            """When the publisher signed these bytes, by Flower's own check, or None. The hub wrote all of it."""
            try:
                record = fab.verifications[publisher]
                if verify(Fab(fab.hash_str, fab.content, {publisher: record}), {publisher: key}):
                    signed_at: int = json.loads(record)["signed_at"]
                    return signed_at
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                pass
            return None

        @wraps(verify)
        def verified(fab: Fab, pinned: dict[str, str]) -> bool:
            times = {name: at for name, key in pinned.items() if (at := good(fab, name, key)) is not None}
            wrong = trust.refusals(hashlib.sha256(fab.content).hexdigest(), times, memory, time.time(), limit)
            for reason in wrong:
                print(reason, flush=True)
            if wrong:  # what Flower answers next
                public = f"{wrong[0].code}  {wrong[0].headline}"
                seams.take(seams.VERIFICATION_ERROR, lambda _: Error(ErrorCode.INVALID_FAB, public))
            return not wrong

        return verified

    seams.take(seams.VERIFY_FAB, with_age)
    seams.take(seams.VERIFICATION_ERROR, lambda flowers: flowers)  # that it will take, before it is needed


def superexec_of(checks: bool) -> Callable[[list[str]], int]:
    """Fork the SuperExec that has the libraries (superexec.py), while there is one thread, and no key or photo in
    memory. With `checks` it makes the fast part of the site's own, which need the libraries, too; ends here where one
    fails. Leaves: what tells it Flower's arguments, and which process it is.
    """
    assert threading.active_count() == 1
    ours, theirs = multiprocessing.Pipe()
    sys.stdout.flush()
    if not (process := os.fork()):
        ours.close()
        superexec.run(theirs, checks)
        sys.exit()
    theirs.close()
    if checks:
        try:
            ours.recv()
        except EOFError:
            sys.exit(1)
    atexit.register(os.kill, process, signal.SIGKILL)  # where nothing begins after all; main() ends past this

    def order(arguments: list[str]) -> int:
        ours.send(arguments)
        return process

    return order


def hasten(order: Callable[[list[str]], int]) -> None:
    """Ask the hub at once where work is likely, and `order` the SuperExec that is there to begin.

    Flower's SuperNode asks every 3 s. Within a round the next message comes seconds after the last reply; a site that
    has been idle for a minute or more may ask as seldom as Flower's, which is what lets one hub have hundreds of them.
    """

    class Warm:
        @staticmethod
        def Popen(command: list[str]) -> None:
            assert command[0] == "flower-superexec", command
            threading.Thread(target=end_with, args=(order(command[1:]),), daemon=True).start()

    class Clock:
        worked = 0.0  # when a message was last worked on

        @classmethod
        def sleep(cls, seconds: float) -> None:
            now = time.monotonic()
            if seconds < IDLE:  # it waits for its own ClientApp
                cls.worked = now
                return time.sleep(min(seconds, LOOK))
            time.sleep(min(seconds, max(LEAST, SHARE * (now - cls.worked))))

    seams.take(seams.SUPERNODES_PROCESS, lambda _: Warm)
    seams.take(seams.SUPERNODES_CLOCK, lambda _: Clock)
    seams.take(seams.SUPERNODES_PULL, lambda pull_objects: partial(pull_objects, **SOON))


def answer_for_the_dead() -> None:
    """A ClientApp that is over and left no reply gets an error for one, which the hub may answer with another try.

    One that is killed at once is missed by its heartbeat and answered for by Flower. One that a signal ends politely
    says that it failed, which Flower takes down, and for its reply the SuperNode then waits for ever. A run that has
    another message here already has had its reply to this one.
    """
    from flwr.common.constant import Status
    from flwr.supercore.constant import TaskType
    from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

    open_ = (Status.PENDING, Status.STARTING, Status.RUNNING)

    def with_reply(finish: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(finish)
        def finish_task(self: Any, task_id: int, sub_status: str, details: str) -> bool:
            finished = finish(self, task_id, sub_status, details)
            [task] = self.get_tasks(task_ids=[task_id]) or [None]
            if not finished or task.type != TaskType.CLIENT_APP:
                return finished
            if not self.get_tasks(run_ids=[task.run_id], statuses=open_):
                for message in self.get_messages_legacy(run_ids=[task.run_id], is_reply=False):  # it never looked at it
                    self.record_message_processing_start(message.metadata.message_id)
                self._store_error_replies({task.run_id}, CLIENT_APP_CRASHED_ERROR)
            return finished

        return finish_task

    seams.take(seams.FINISH_TASK, with_reply)


def end_with(process: int) -> None:
    """End here when the SuperExec has: Flower's SuperNode would stay online and work on no message ever again."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    time.sleep(GOODBYE)
    print(f"bouquet: the SuperExec has ended ({code}), and the SuperNode with it", flush=True)
    os._exit(1)


def end_with_any_thread(failure: threading.ExceptHookArgs) -> None:
    """End here when a thread has died: without its heartbeat a SuperNode lives on, offline for ever."""
    traceback.print_exception(failure.exc_value)
    print("bouquet: a thread of the SuperNode has died, and the SuperNode with it", flush=True)
    sys.stderr.flush()
    os._exit(1)


def end_with_threads() -> None:
    seams.take(seams.DEAD_THREAD, lambda _: end_with_any_thread)


def main() -> None:
    sys.argv = [os.path.expandvars(argument) for argument in sys.argv]
    trusting = limit_trust(sys.argv[1:])
    order = superexec_of(checks=bool(os.environ.get("BOUQUET_PREFLIGHT")))
    if "BOUQUET_HEARD" in os.environ:
        heard = Path(os.environ["BOUQUET_HEARD"])
        seams.begin(lambda: note_answers(heard))
    seams.begin(lambda: hasten(order), outlast_the_last_session, answer_for_the_dead, end_with_threads, trusting)
    code: int | str | None = 1
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code
    except BaseException:  # whatever ended the loop: say it, then end the process
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
