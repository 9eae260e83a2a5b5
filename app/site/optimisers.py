"""What takes a site's steps, by `optimizer`; each from the library that keeps it.

Enters: the adapter's parameters and the run's config. Leaves: a fresh torch optimiser without weight decay.
docs/run-config.md says why Prodigy is not among them.
adamw: Loshchilov and Hutter 2017, arXiv:1711.05101, torch's. adamw-8bit: the same with both moments in 8 bits,
Dettmers et al. 2021, arXiv:2110.02861, bitsandbytes'. adafactor: second moments as rows and columns, no first one,
Shazeer and Stern 2018, arXiv:1804.04235, transformers'; not torch's, whose steps are as long as the parameter is, and
B begins at 0.
Errors: SITE-16 (a library is not installed).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from app.config import RunConfig
from app.errors import SiteError

LIBRARIES = {"adamw-8bit": "bitsandbytes"}  # what not every site has
# bytes that an optimiser keeps for a number in float32: two moments; two of a byte each, with what they are scaled by
# for each 256; a number a row and a column
KEPT = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256, "adafactor": 0.5}


def check(config: RunConfig) -> None:
    """Whether this site can take such steps. Errors: SITE-16."""
    library = LIBRARIES.get(config.optimizer)
    if library and not find_spec(library):
        raise SiteError(
            "SITE-16",
            library=library,
            found=f"optimizer = {config.optimizer!r}, and {library} is not installed",
            fix=(
                f"where this site trains: python -m pip install -c constraints.txt {library}, or run with another"
                " optimizer"
            ),
        )


def of(config: RunConfig, trained: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Errors: SITE-16."""
    check(config)
    how: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": 0.0}
    match config.optimizer:
        case "adamw-8bit":
            from bitsandbytes.optim import AdamW8bit

            made: torch.optim.Optimizer = AdamW8bit(trained, **how)
            return made
        case "adafactor":
            from transformers.optimization import Adafactor

            how |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            factored: torch.optim.Optimizer = Adafactor(trained, **how)
            return factored
    return torch.optim.AdamW(trained, **how, fused=device.type == "cuda" or None)


def anchors(config: RunConfig, trained: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Where FedProx pulls to: what arrived. None of a run without it."""
    return [parameter.detach().clone() for parameter in trained] if config.proximal_mu else []


def pull(config: RunConfig, trained: Iterable[torch.nn.Parameter], arrived: Sequence[torch.Tensor]) -> None:
    """Add the gradient of mu/2 |w - w_global|², mu = proximal_mu. Source: Li et al. 2020, arXiv:1812.06127, eq. 2."""
    for parameter, anchor in zip(trained, arrived, strict=False):
        assert parameter.grad is not None
        parameter.grad.add_(parameter.detach() - anchor, alpha=config.proximal_mu)
