"""The fork server and the workers of a SuperNode: what they hold, what they must never do, and that runs and messages
keep apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

from bouquet import ROOT
from tests.kit.wait import PATIENT

PRELUDE = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bouquet.flower import superexec; import json; "


def run(code: str) -> list:
    """What a fresh Python says, as JSON, a line each; it ends with 0."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def messages() -> list:
    """Three processes one after another from one server: the first leaves a mark, the second is killed, the third
    begins one of its own; and the server's name and threads.
    """
    child = (
        "import builtins, json, os, sys; print(json.dumps([os.getpid(), sorted({'torch', 'peft', 'diffusers', 'app'} &"
        " sys.modules.keys()), hasattr(builtins, 'mark')]), flush=True); "
    )
    more = (
        "import multiprocessing as m; own = m.get_context('forkserver').Process(target=bool); own.start(); own.join();"
        " print(json.dumps(own.exitcode), flush=True)"
    )
    return run(f"""{PRELUDE}
import multiprocessing.forkserver as forkserver, os
fork = superexec.server()
for what in ("builtins.mark = 1", "os.kill(os.getpid(), 9)", {more!r}):
    process = fork.Process(target=exec, args=({child!r} + what, {{}}))
    process.start()
    process.join()
server = f"/proc/{{forkserver._forkserver._forkserver_pid}}"
print(json.dumps([open(server + "/comm").read(), len(os.listdir(server + "/task"))]))
""")


def test_a_worker_starts_with_the_libraries_in_memory_and_without_the_app(messages):
    assert [loaded for _, loaded, _ in messages[:3]] == [["diffusers", "peft", "torch"]] * 3


def test_a_worker_sees_nothing_of_another(messages):
    assert len({pid for pid, _, _ in messages[:3]}) == 3
    assert [mark for _, _, mark in messages[:3]] == [False] * 3


def test_a_worker_that_was_killed_takes_neither_the_server_nor_the_next_one_along(messages):
    assert len(messages) == 5  # the second was killed, the third answered


def test_a_worker_may_begin_processes_of_its_own(messages):
    """The server is forked while its parent has the lock on what it knows of it."""
    assert messages[3] == 0


def test_the_server_has_one_thread_so_that_forking_it_is_safe_and_a_name_that_ps_shows(messages):
    assert messages[4] == ["forkserver\n", 1]


# --- a GPU in a forked process
# ----------------------------------------------------------------------------------------- torch's CPU build cannot
# poison a fork. Here it says what a CUDA build says, and keeps who asked CUDA itself: each of these calls marks the
# processes that are forked afterwards. tests/test_cuda.py does the same with the CUDA build.

AS_CUDA = """
import torch
asked = []
for name in ("_cuda_getDeviceCount", "_cuda_init", "_cuda_getDevice", "_cuda_getArchFlags"):
    setattr(torch._C, name, lambda *a, name=name: asked.append(name) or 0)
torch._C._cuda_getCurrentRawStream = None  # a CUDA build has it; the compiler's modules import it
torch.cuda._is_compiled = lambda: True
torch._C._accelerator_getAccelerator = lambda *a, **k: torch.device("cuda")
"""


@pytest.mark.slow
def test_importing_the_libraries_never_asks_cuda_whatever_the_user_set():
    [[asked, after]] = run(f"""{PRELUDE}
import os
os.environ |= {{"PYTORCH_NVML_BASED_CUDA_CHECK": "0", "CUDA_VISIBLE_DEVICES": "0"}}
{AS_CUDA}
from bouquet.flower import libraries
before = list(asked)
torch.cuda.is_available()
print(json.dumps([before, asked]))
""")
    assert asked == []
    assert after == ["_cuda_getDeviceCount"]  # from now on it is CUDA that answers


@pytest.mark.slow
def test_the_libraries_do_ask_cuda_where_nvml_does_not_answer_for_it():
    [asked] = run(f"""{PRELUDE}
{AS_CUDA}
import diffusers.models.unets.unet_2d_condition
print(json.dumps(asked))
""")
    assert "_cuda_getDeviceCount" in asked  # else the guard is no longer needed, and the test above shows nothing


@pytest.mark.slow
def test_a_library_that_starts_cuda_at_import_is_left_to_the_worker_that_needs_it(tmp_path):
    """bitsandbytes, which peft imports wherever it is installed; here one that only asks."""
    (tmp_path / "bitsandbytes.py").write_text("import torch\ntorch._C._cuda_init()\n")
    [[before, after]] = run(f"""{PRELUDE}
sys.path.insert(0, {str(tmp_path)!r})
{AS_CUDA}
from bouquet.flower import libraries
import peft
before = list(asked)
import bitsandbytes
print(json.dumps([before, asked]))
""")
    assert (before, after) == ([], ["_cuda_init"])


@pytest.mark.slow
def test_a_server_whose_children_could_not_use_the_gpu_does_not_start():
    [said] = run(f"""{PRELUDE}
import torch
torch._C._cuda_isInBadFork = lambda: True
try:
    from bouquet.flower import libraries
except RuntimeError as error:
    print(json.dumps(str(error)))
""")
    assert said.startswith(
        "GPU-07  A message's process could not use the GPU.\n  found  a library asked CUDA while it was imported"
    )


@pytest.mark.parametrize(("visible", "gpus"), [(None, 2), ("", 0), ("-1", 0), ("1", 2)])
def test_the_number_of_gpus_is_nvmls_unless_cuda_was_told_to_see_none(visible, gpus, monkeypatch, tmp_path):
    from bouquet.flower import libraries
    from tests.kit.nvml import A10, T4, StandIn

    StandIn(tmp_path, monkeypatch).state(A10, T4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert libraries.gpus_by_nvml() == gpus


# --- which worker takes a message
# --------------------------------------------------------------------------------------

DRIVER = """
import json, os, sys, time
sys.path.insert(0, {docker!r})
from bouquet.flower import superexec

def work(orders, keep):
    '''In place of the app: says who took which message, and keeps something unless it is told not to.'''
    while True:
        try:
            (what, *_), began = orders.recv()
        except EOFError:
            return
        assert 0 <= time.monotonic() - began < {patient}
        if what == "dies":
            os._exit(9)
        time.sleep(0.5 if what == "slow" else 0)
        with open({out!r}, "a") as file:
            file.write(f"{{what}} {{os.getpid()}}\\n")
        orders.send(keep and what != "last")

def after(workers, seconds={patient}):
    '''Until none is busy.'''
    end = time.monotonic() + seconds
    while workers.tidy() or any(worker.busy for worker in workers.alive):
        assert time.monotonic() < end
        time.sleep(0.01)

def play(server, keep, orders):
    workers = superexec.Workers(server, keep)
    for order in orders:
        if order == "wait":
            after(workers)
        elif order == "later":
            time.sleep(1.2); workers.tidy()
        elif order == "alive":
            with open({out!r}, "a") as file:
                file.write(f"alive {{sum(worker.process.is_alive() for worker in workers.alive)}}\\n")
        else:
            workers.run, _, what = order.partition(":")
            workers.start([what])
    after(workers)
    for worker in list(workers.alive):
        workers._end(worker)

if __name__ == "__main__":
    superexec.work, server = work, superexec.server()
    for line in sys.stdin:
        open({out!r}, "w").close()
        play(server, *json.loads(line))
        print("played", flush=True)
"""
Took = Callable[..., list[tuple[str, int]]]


@pytest.fixture(scope="module")
def took(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Took]:
    """What a SuperExec's workers do with orders, from one fork server: (message, a number that stands for the process
    that took it) in the order in which they ended; or (alive, how many wait).
    """
    folder = tmp_path_factory.mktemp("workers")
    out, driver = folder / "out", folder / "driver.py"
    driver.write_text(DRIVER.format(docker=str(ROOT), out=str(out), patient=PATIENT))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, driver], **pipes) as process:

        def play(*orders: str, keep: float = 300) -> list[tuple[str, int]]:
            print(json.dumps([keep, orders]), file=process.stdin, flush=True)
            assert process.stdout.readline() == "played\n"
            pids: dict[str, int] = {}
            lines = [line.split() for line in out.read_text().splitlines()]
            return [(what, int(who) if what == "alive" else pids.setdefault(who, len(pids) + 1)) for what, who in lines]

        yield play
        process.stdin.close()


@pytest.mark.slow
def test_the_messages_of_a_run_go_to_one_process(took):
    assert took("7:a", "wait", "7:b", "wait", "7:c") == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.slow
def test_another_run_gets_a_process_of_its_own_and_ends_the_idle_one(took):
    assert took("7:a", "wait", "8:b", "wait", "alive", "7:c") == [("a", 1), ("b", 2), ("alive", 1), ("c", 3)]


def test_a_busy_worker_of_another_run_finishes_its_message(took):
    assert took("7:slow", "8:b", "wait") == [("b", 1), ("slow", 2)]


def test_a_worker_that_keeps_nothing_ends(took):
    assert took("7:a", "wait", "7:last", "wait", "alive", "7:b") == [
        ("a", 1),
        ("last", 1),
        ("alive", 0),
        ("b", 2),
    ]


def test_a_worker_that_died_is_followed_by_a_fresh_one(took):
    assert took("7:a", "wait", "7:dies", "wait", "7:b") == [("a", 1), ("b", 2)]


def test_a_worker_that_waited_too_long_ends(took):
    assert took("7:a", "wait", "alive", "later", "alive", "7:b", keep=1) == [
        ("a", 1),
        ("alive", 1),
        ("alive", 0),
        ("b", 2),
    ]


def test_with_nothing_to_keep_every_message_has_a_process_of_its_own(took):
    assert took("7:a", "wait", "7:b", keep=0) == [("a", 1), ("b", 2)]


def test_a_process_that_has_a_parent_to_watch_watches_it_once():
    [rest] = run(
        PRELUDE + "print(json.dumps(superexec.watched_already(['--token', 'x', '--parent-pid', '7', '--insecure'])))"
    )
    assert rest == ["--token", "x", "--insecure"]


def test_every_place_in_flower_where_the_workers_are_put_is_there():
    run(PRELUDE + "superexec.adopt(superexec.Workers(None, 1.0))")


def test_what_a_message_holds_is_looked_for_sooner_than_a_second_later_by_site_and_hub(monkeypatch):
    """A message, or a reply, is there a moment before its objects are; Flower's first second of waiting was a second of
    every other round.
    """
    import inspect

    from flwr.supercore.inflatable import inflatable_utils
    from flwr.superlink.grid import http_grid

    from app.hub import bounds

    [soon] = run(PRELUDE + "print(json.dumps(superexec.SOON))")
    assert soon.keys() <= inspect.signature(inflatable_utils.pull_and_inflate_object_from_tree).parameters.keys()
    assert soon["initial_backoff"] < 0.1
    tries, waited = [], []
    monkeypatch.setattr(http_grid, "pull_objects", None)
    bounds.bound_replies(2**20, time.time() + 60)

    def pull(name: str) -> bytes:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise ObjectUnavailableError(name)
        return b"x"

    assert http_grid.pull_objects(["a"], pull) == {"a": b"x"}
    waited = [later - sooner for sooner, later in zip(tries, tries[1:], strict=False)]
    assert bounds.FIRST / 2 < waited[0] < waited[1] < 0.9, waited
