"""One quiet stream: a run prints our lines, and of others' their warnings and errors.

Flower tells of every step, once more for each part of a reply; transformers, diffusers and huggingface_hub draw
progress bars, which are noise in a log, and transformers says what else one could install. Each has a switch of its
own, and whoever has set one (FLWR_LOG_LEVEL, TRANSFORMERS_VERBOSITY, DIFFUSERS_VERBOSITY) keeps it. Warnings of Flower
and torch stay. What a base model lacks is no matter of such warnings: model.py refuses it.
Enters, leaves: nothing. Errors: none.
"""

from __future__ import annotations

import logging
import os


def flower() -> None:
    """From now on Flower's log in this process begins with warnings."""
    if not os.environ.get("FLWR_LOG_LEVEL"):
        logging.getLogger("flwr").setLevel(logging.WARNING)


def libraries() -> None:
    """From now on the libraries that load models draw no bars and give no hints.

    It imports them, so it is called where there is work.
    """
    from diffusers.utils import logging as diffusers
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers

    for name, library in (("TRANSFORMERS", transformers), ("DIFFUSERS", diffusers)):
        library.disable_progress_bar()
        if not os.environ.get(f"{name}_VERBOSITY"):
            library.set_verbosity_error()
    disable_progress_bars()
