"""A site that does wrong: this folder on a SuperNode's PYTHONPATH, and BOUQUET_WRONG names a file of JSON, {round:
what it does}.

In the ClientApp's process: a lie of lies.py, no GPU memory in the training step, or a step that takes its time. In the
SuperNode's: the first reply of all, sent again.
"""

import json
import os
import sys
import time
from pathlib import Path

FILE = Path(os.environ.get("BOUQUET_WRONG", ""))
PROGRAM = " ".join(sys.orig_argv)
SLOWLY, SECONDS = "slowly", 5.0  # so long at least somebody who looks on finds the site in the middle of its round


def wrong(number: object) -> str:
    """What this site does wrong in that round; '' is nothing."""
    return json.loads(FILE.read_text()).get(str(number), "") if FILE.is_file() else ""


def lying_client() -> None:
    import lies
    from flwr.app import Array
    from flwr.clientapp import ClientApp

    answer, deflate = ClientApp.__call__, Array.deflate

    def spoiled(self, message, context):
        config = message.content["config"]
        name = wrong(config.get("round", config.get("server-round")))
        sent, Array.deflate = message.content, deflate  # one process takes all messages of a run
        if name.startswith("no GPU memory"):
            no_memory(also_with_half=name.endswith("half"))
        if name == SLOWLY:
            take_time()
        reply = answer(self, message, context)
        if reply.has_content() and "arrays" in reply.content:
            kept = FILE.with_name(f"kept-{context.run_id}.safetensors")
            lies.tell(name if name in lies.LIES else "", reply.content, sent, kept)
        if name in lies.WIRE:
            Array.deflate = lambda array: lies.WIRE[name](deflate, array)
        return reply

    ClientApp.__call__ = spoiled


def no_memory(also_with_half: bool) -> None:
    """The training step finds no GPU memory, at first, or whatever it tries."""
    import torch

    from app.site import diffusion

    loss, tried = diffusion.noise_loss, []

    def step(*args, **kwargs):
        tried.append(1)
        if also_with_half or len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if len(tried) == 2:
            print(f"hostile: memory again, for {len(args[2])} images", flush=True)
        return loss(*args, **kwargs)

    diffusion.noise_loss = step


def take_time() -> None:
    """The next training step begins late."""
    from app.site import diffusion

    loss, tried = diffusion.noise_loss, []

    def step(*args, **kwargs):
        if not tried:
            tried.append(1)
            time.sleep(SECONDS)
        return loss(*args, **kwargs)

    diffusion.noise_loss = step


def replaying_supernode() -> None:
    from flwr.supernode.fleet_http_client import FleetHttpClient

    push, first = FleetHttpClient.PushMessages, []

    def with_the_first(self, request):
        first.append(request)
        if wrong(request.messages_list[0].metadata.group_id) == "a replayed reply":
            print("hostile: the first reply once more:", _outcome(push, self, first[0]), flush=True)
        return push(self, request)

    FleetHttpClient.PushMessages = with_the_first


def _outcome(call, *args) -> str:
    try:
        return str(call(*args)).replace("\n", " ")
    except Exception as error:
        return repr(error)


SUPERNODE = "bouquet.flower.supernode"  # from which all of a site's processes are forked
if FILE.name and any(name in PROGRAM for name in ("flwr-clientapp", SUPERNODE, "multiprocessing.forkserver")):
    lying_client()
if FILE.name and SUPERNODE in PROGRAM:
    replaying_supernode()
