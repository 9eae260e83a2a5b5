"""Flower's SuperExec of a SuperNode, with the libraries already in memory: a message's process is forked, not started.

Flower starts a new process for every message, and importing torch, peft and diffusers takes that process 4 to 6 s, each round,
before it does anything. Here Python's own fork server imports them once; each message still gets a process of its own, which begins
as a copy of that server and ends with its message, so nothing of one run or message is there for the next, and a crash takes
nobody along. The server imports and nothing else: it holds no key, no photo and no model, starts no thread and does not touch the GPU.
Enters: flower-superexec's own arguments. Leaves: its exit code.
"""

import ctypes
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import sys

LIBRARIES = ["accelerate", "peft", "diffusers.models.unets.unet_2d_condition", "diffusers.schedulers.scheduling_ddpm", "flwr.supernode.cli.flwr_clientapp"]
PR_SET_NAME = 15  # prctl(2)


def server() -> multiprocessing.context.BaseContext:
    """The running fork server, which has the libraries in a few seconds; its Process starts where their import has ended."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(LIBRARIES)
    multiprocessing.forkserver.ensure_running()
    return fork


def work(arguments: list[str], quiet: bool) -> None:
    """One message, in the forked process: what Flower's command flwr-clientapp does."""
    gc.freeze()  # the collector would write to every object of the libraries: 150 MB that stay shared with the fork server
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    ctypes.CDLL(None).prctl(PR_SET_NAME, b"flwr-clientapp")  # its name in ps and top
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
    sys.argv = ["flwr-clientapp", *arguments]
    flwr_clientapp()


def main() -> None:
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.superexec.executor import SubprocessExecutor, subprocess_executor

    fork = server()

    class Forked:
        """In place of subprocess.Popen, for the one thing that Flower's executor does with it."""

        DEVNULL = None

        @staticmethod
        def Popen(command: list[str], **outputs: None) -> None:
            assert command[0] == "flwr-clientapp", command
            multiprocessing.active_children()  # reaps those that have ended
            fork.Process(target=work, args=(command[1:], bool(outputs)), daemon=True).start()

    subprocess_executor.subprocess = Forked
    assert SubprocessExecutor.launch.__globals__["subprocess"] is Forked
    flower_superexec()


if __name__ == "__main__":
    main()
