"""Every strategy against numbers worked out by hand, and its state in and out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.hub import guard, spool, strategy
from app.hub.strategy import Strategy
from tests.kit import tiny


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> None:
    tiny.be_the_hub(monkeypatch)


def reply(site: str, images: int, value: list[float] | int) -> guard.Reply:
    """A site's reply with the adapter {"w": value}, or the tiny adapter of that seed."""
    adapter = tiny.adapter(value) if isinstance(value, int) else {"w": torch.tensor(value)}
    return guard.Reply(site, adapter, images, {})


def mean(replies: list[guard.Reply], **config) -> dict[str, torch.Tensor]:
    return Strategy(tiny.config(**config)).aggregate(
        1, replies, {key: torch.zeros_like(v) for key, v in replies[0].adapter.items()}
    )


def test_two_sites_result_is_the_mean_weighted_by_images_worked_out_in_numpy():
    one, two = tiny.adapter(1), tiny.adapter(2)
    result = mean([reply("site-1", 30, 1), reply("site-2", 10, 2)])
    assert list(result) == list(one)
    for key, value in result.items():
        by_hand = one[key].numpy() * np.float32(0.75) + two[key].numpy() * np.float32(0.25)
        np.testing.assert_array_equal(value.numpy(), by_hand)
        assert value.dtype == torch.float32


def test_one_number_by_hand():
    # (1·5 + 3·1) / 4 = 2
    assert mean([reply("a", 1, [5.0]), reply("b", 3, [1.0])])["w"].tolist() == [2.0]


def test_one_site_alone_returns_its_own_adapter_bit_for_bit():
    assert tiny.equal(mean([reply("site-1", 7, 1)]), tiny.adapter(1))


def test_the_order_of_replies_does_not_matter_bit_for_bit():
    replies = [reply(f"site-{n}", 10 + 7 * n, n) for n in range(1, 6)]
    first = mean(replies)
    for turn in range(1, 5):
        assert tiny.equal(mean(replies[turn:] + replies[:turn]), first)


@pytest.mark.parametrize("kind", ["fedavg", "fedavgm", "fedadam", "median", "trimmed-mean", "krum"])
def test_a_few_tensors_at_a_time_give_the_same_adapter_bit_for_bit(kind, monkeypatch):
    replies = [reply(f"site-{n}", 10 + n, n) for n in range(1, 6)]
    rounds = []
    for most in (2**27, 1):
        monkeypatch.setattr(spool, "MOST", most)
        calls = []
        call = strategy._call

        def counted(flower, number, replies, keys, calls=calls, call=call):
            calls.append(len(list(keys)))
            return call(flower, number, replies, keys)

        monkeypatch.setattr(strategy, "_call", counted)
        one = Strategy(tiny.config(strategy=kind))
        first = one.aggregate(1, replies, tiny.adapter(9))
        rounds.append((first, one.aggregate(2, replies, first)))
        monkeypatch.setattr(strategy, "_call", call)
    assert all(tiny.equal(whole, parts) for whole, parts in zip(*rounds, strict=True))
    assert (1 in calls) == (kind != "krum")


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "median", "trimmed-mean", "krum"])
def test_aggregating_does_not_change_what_the_sites_sent(strategy):
    replies = [reply(f"site-{n}", 10, n) for n in range(1, 6)]
    mean(replies, strategy=strategy)
    assert all(tiny.equal(r.adapter, tiny.adapter(n)) for n, r in enumerate(replies, start=1))


def test_the_median_takes_no_notice_of_how_far_off_one_site_is():
    assert mean([reply("a", 1, [1.0]), reply("b", 99, [2.0]), reply("c", 1, [1e9])], strategy="median")[
        "w"
    ].tolist() == [2.0]


def test_the_trimmed_mean_leaves_out_both_ends():
    # of 1, 2, 3, 4, 1000 a fifth at either end goes: (2 + 3 + 4) / 3
    replies = [reply(site, 1, [value]) for site, value in zip("abcde", [3.0, 1000.0, 2.0, 1.0, 4.0], strict=True)]
    assert mean(replies, strategy="trimmed-mean", trimmed_share=0.2)["w"].tolist() == [3.0]


def test_krum_takes_the_one_that_has_its_neighbours_nearest():
    # distances² to the 5 − 1 − 2 = 2 nearest: 1.0 -> 0.01 + 0.04, 1.1 -> 0.01 + 0.01, 1.2 -> 0.01 + 0.04; the others
    # are far
    replies = [reply(site, 1, [value]) for site, value in zip("abcde", [1.0, 1.1, 1.2, 9.0, -9.0], strict=True)]
    assert mean(replies, strategy="krum", krum_malicious=1)["w"].tolist() == [pytest.approx(1.1)]


def test_fedavgm_carries_its_momentum_from_round_to_round():
    # round 1: 0 -> 1, momentum 1. round 2: the mean is 2, the step 1 + 0.9·1 = 1.9, so 1 -> 2.9
    strategy = Strategy(tiny.config(strategy="fedavgm"))
    first = strategy.aggregate(1, [reply("a", 1, [1.0])], {"w": torch.zeros(1)})
    assert first["w"].tolist() == [1.0]
    assert strategy.aggregate(2, [reply("a", 1, [2.0])], first)["w"].tolist() == [pytest.approx(2.9)]


def test_fedadam_takes_a_normalised_step():
    # m = 0.1·1, v = 0.01·1, bias-corrected for round 1: eta · sqrt(1 − 0.99²) / (1 − 0.9²) · m / (sqrt(v) + 0.001)
    got = mean([reply("a", 1, [1.0])], strategy="fedadam", server_learning_rate=0.01)["w"].item()
    assert got == pytest.approx(0.01 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2) * 0.1 / (0.1 + 0.001), rel=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam", "median"])
def test_a_strategy_that_was_put_away_and_taken_up_goes_on_bit_for_bit(strategy):
    config, start = tiny.config(strategy=strategy, server_learning_rate=0.5), tiny.adapter(0)
    whole, cut = Strategy(config), Strategy(config)
    one = whole.aggregate(1, [reply("a", 3, 1), reply("b", 1, 2)], start)
    assert tiny.equal(cut.aggregate(1, [reply("a", 3, 1), reply("b", 1, 2)], start), one)
    again = Strategy(config, cut.state())
    assert bool(cut.state()) == (strategy in {"fedavgm", "fedadam"})
    rounds = [s.aggregate(2, [reply("a", 3, 3), reply("b", 1, 4)], one) for s in (whole, again)]
    assert tiny.equal(*rounds)


def test_fedavgm_takes_tensors_by_name_whatever_their_order():
    config, start = tiny.config(strategy="fedavgm"), tiny.adapter(0)
    turned = {key: start[key] for key in reversed(start)}
    one, two = (Strategy(config).aggregate(1, [reply("a", 1, 1)], adapter) for adapter in (start, turned))
    assert tiny.equal(one, two)
