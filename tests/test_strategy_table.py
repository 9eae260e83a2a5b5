"""Which strategy goes with what: the tables of docs/learning.md against the code that takes a run or refuses it."""

from __future__ import annotations

import re

import pytest
import torch

from app.config import STRATEGIES, RunConfig
from app.errors import BouquetError
from app.hub.guard import Reply
from app.hub.strategy import Strategy
from app.rules import ONLY
from app.site import budget
from app.site.limits import Limits
from bouquet import ROOT
from tests.kit import tiny

PAGE = (ROOT / "docs" / "learning.md").read_text()
SITES = 9  # as many as any strategy asks for
RUN = {"base-model": "tiny", "lora-rank": 16, "min-sites": SITES, "norm-bound": 0.0}
SETS: dict[str, dict[str, object]] = {  # a word of the tables: the run's keys, or SITE_ variables, that it stands for
    **{name: {"strategy": name} for name in STRATEGIES},
    "secrecy=masks": {"secrecy": "masks"},
    "norm-bound": {"norm-bound": 3.0},
    "ema-decay": {"ema-decay": 0.9},
    "proximal-mu": {"proximal-mu": 0.1},
    "wire-precision=fp16": {"wire-precision": "fp16"},
    "prior-loss-weight": {"prior-loss-weight": 1.0},
    "resolutions": {"resolutions": "32,64"},
    "start-from": {"start-from": "flowers.safetensors"},
    "resume": {"resume": "latest"},
    "SITE_PRIVACY": {"SITE_PRIVACY": "epsilon=8 delta=1e-5 clip=0.05"},
    "rank=8": {"SITE_LIMITS": "rank=8"},
}


def rows(name: str) -> list[list[str]]:
    [table] = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.DOTALL)
    head, _, *lines = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [head, *lines]


def cells(name: str) -> list[tuple[str, str, str]]:
    head, *lines = rows(name)
    return [(line[0], column, cell) for line in lines for column, cell in zip(head[1:], line[1:], strict=True)]


def verdict(*words: str, cached) -> str:
    """Of a run with all of these, at a site with all of these: "yes", or the code that refuses it."""
    given = RUN | {key: value for word in words for key, value in SETS[word].items()}
    env = {key: str(given.pop(key)) for key in list(given) if key.startswith("SITE_")}
    try:
        config = RunConfig.read(given)
        Limits.read(env.get("SITE_LIMITS", "")).check(config)
        budget.check(config, budget.of(env, cached))
    except BouquetError as error:
        return error.code
    return "yes"


@pytest.mark.parametrize(("row", "column", "cell"), [*cells("strategies"), *cells("pairs")])
def test_a_cell_says_what_the_code_says(row, column, cell, tmp_path):
    assert verdict(row, column, cached=tmp_path) == cell


def test_every_strategy_has_a_row_and_each_alone_is_a_run(tmp_path):
    assert [line[0] for line in rows("strategies")[1:]] == list(STRATEGIES)
    assert {verdict(name, cached=tmp_path) for name in STRATEGIES} == {"yes"}


def test_a_rank_is_taken_by_svd_with_a_promise_too(tmp_path):
    assert verdict("svd", "rank=8", "SITE_PRIVACY", cached=tmp_path) == "yes"


@pytest.mark.parametrize("name", STRATEGIES)
def test_where_resume_says_yes_a_strategy_that_was_put_away_goes_on_bit_for_bit(name, monkeypatch):
    tiny.be_the_hub(monkeypatch)
    config = RunConfig.read(RUN | SETS[name])
    draw = torch.Generator().manual_seed(1)

    def adapter() -> dict[str, torch.Tensor]:
        factors = {"A": (2, 3), "B": (3, 2)}
        return {f"l.lora_{end}.weight": torch.randn(shape, generator=draw) for end, shape in factors.items()}

    sent = adapter()
    first, second = ([Reply(f"s{n}", adapter(), 10 + n, {}) for n in range(SITES)] for _ in range(2))
    whole = Strategy(config)
    between = whole.aggregate(1, first, sent)
    again = Strategy(config, whole.state())
    assert tiny.equal(whole.aggregate(2, second, between), again.aggregate(2, second, between))


def test_the_page_names_the_keys_that_only_some_runs_read():
    [said] = re.findall(r"\*\*A key that the run does not read\*\* \((.*?)\)", PAGE, re.DOTALL)
    assert sorted(re.findall(r"`([a-z-]+)`", said)) == sorted(key.replace("_", "-") for key in ONLY)
