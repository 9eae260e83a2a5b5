"""The learning rate at each step of the whole run: a site knows where it is from the round's number alone.

Enters: the run's config. Leaves: a factor of `learning-rate` by the number of optimiser steps that the run took before
at each site. So a site that joins late, a round that is tried again and a run that is taken up have the same rate at
the same step; the warm-up and the falling happen once a run and not once a round. A run that goes on with other numbers
of rounds or steps is where these say.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from app.config import RunConfig

LAST = 4  # "tail": constant, and falling to 0 over the last one of so many parts of the run


def factors(config: RunConfig) -> Callable[[int], float]:
    """step (0 is the run's first) -> what `learning-rate` is multiplied by.

    constant and tail are told here, linear and cosine are diffusers' own (`get_scheduler`), as is the warm-up: from 0
    in equal steps. Source of the cosine: Loshchilov and Hutter 2016, arXiv:1608.03983, eq. 5.
    """
    warm, total = config.warmup_steps, config.rounds * config.local_steps
    if config.learning_rate_schedule in ("linear", "cosine"):
        from diffusers.optimization import get_scheduler

        optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        theirs = get_scheduler(
            config.learning_rate_schedule, optimiser, num_warmup_steps=warm, num_training_steps=total
        )
        factor: Callable[[int], float] = theirs.lr_lambdas[0]
        return factor
    tail = total / LAST if config.learning_rate_schedule == "tail" else 0.0

    def told(step: int) -> float:
        return max(0.0, min(step / warm if step < warm else 1.0, (total - step) / tail if tail else 1.0))

    return told
