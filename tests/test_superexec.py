"""The fork server from which a SuperNode's messages start: what it holds, what it must never do, and that messages keep apart."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PRELUDE = f"import sys; sys.path.insert(0, {str(ROOT / 'docker')!r}); import superexec, json; "


def run(code: str) -> list:
    """What a fresh Python says, as JSON, a line each; it ends with 0."""
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def messages() -> list:
    """Three messages one after another from one server: the first leaves a mark, the second is killed; and the server's threads."""
    child = "import builtins, json, os, sys; print(json.dumps([os.getpid(), sorted({'torch', 'peft', 'diffusers', 'app'} & sys.modules.keys()), hasattr(builtins, 'mark')]), flush=True); "
    return run(f"""
import multiprocessing.forkserver as forkserver, os
fork = superexec.server()
for what in ("builtins.mark = 1", "os.kill(os.getpid(), 9)", ""):
    process = fork.Process(target=exec, args=({child!r} + what, {{}}))
    process.start()
    process.join()
print(json.dumps(len(os.listdir(f"/proc/{{forkserver._forkserver._forkserver_pid}}/task"))))
""")


def test_a_message_starts_with_the_libraries_in_memory_and_without_the_app(messages):
    assert [loaded for _, loaded, _ in messages[:3]] == [["diffusers", "peft", "torch"]] * 3


def test_a_message_sees_nothing_of_the_one_before(messages):
    assert len({pid for pid, _, _ in messages[:3]}) == 3
    assert [mark for _, _, mark in messages[:3]] == [False] * 3


def test_a_message_that_was_killed_takes_neither_the_server_nor_the_next_one_along(messages):
    assert len(messages) == 4  # the second was killed, the third answered


def test_the_server_has_one_thread_so_that_forking_it_is_safe(messages):
    assert messages[3] == 1


def test_importing_the_libraries_does_not_touch_the_gpu():
    """A process forked from one that has used CUDA cannot use it."""
    [[asked, initialized]] = run("""
import importlib, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, lambda *a, name=name, **k: asked.append(name) or 0)
for name in superexec.LIBRARIES:
    importlib.import_module(name)
print(json.dumps([asked, torch.cuda.is_initialized()]))
""")
    assert asked == [] and not initialized
