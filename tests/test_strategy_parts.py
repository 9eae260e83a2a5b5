"""Rounds in which a site trains a part of the adapter: one half of each layer (strategy=alternate), or a rank below the
run's (SITE_LIMITS='rank=…', strategy=svd). By hand on 2×2 matrices, on the tiny net, and as whole runs in one process.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from app import lora, masks, model, wire
from app.adapter import store
from app.config import RunConfig
from app.errors import AdapterError, BouquetError, HubError, SiteError
from app.hub import guard, products, server_app
from app.hub.exchange import Exchange
from app.hub.strategy import Strategy
from app.hub.sums import Sums
from app.model import Adapter
from app.site import diffusion, dp, factors, journal, train
from app.site.accountant import Terms
from app.site.limits import Limits
from tests.kit import families as kit
from tests.kit import tiny
from tests.kit.memory import Federation
from tests.test_families import config as family_config
from tests.test_families import photos
from tests.test_masks import federation as with_masks
from tests.test_train import encoded

ALTERNATE, SVD = tiny.config(strategy="alternate"), tiny.config(strategy="svd")


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> None:
    tiny.be_the_hub(monkeypatch)


def layer(down: list[list[float]], up: list[list[float]]) -> Adapter:
    """An adapter of one layer: A, B."""
    return {"l.lora_A.weight": torch.tensor(down), "l.lora_B.weight": torch.tensor(up)}


def product(adapter: Adapter) -> torch.Tensor:
    return adapter["l.lora_B.weight"] @ adapter["l.lora_A.weight"]


def reply(part: Adapter, sent: Adapter, site: str = "a", images: int = 1, rank: object = None, **how) -> guard.Reply:
    """What the guard makes of a site's message."""
    info = {"site": site, "applied": model.adapter_hash(sent)} | ({} if rank is None else {"rank": rank})
    numbers = {"num-examples": images, "train-loss": 0.5, "validation-loss": 0.4}
    told = {"info": ConfigRecord(info), "metrics": MetricRecord(numbers), "arrays": wire.pack(part)}
    message = Message(RecordDict(told), reply_to=Message(RecordDict(), dst_node_id=77, message_type="train"))
    return guard.accept(message, sent, model.adapter_hash(sent), training=True, **how)


def exchange(kind: type[Exchange], federation: Federation, monkeypatch: pytest.MonkeyPatch) -> Exchange:
    """The hub's side of a federation, for a round without all that a run has besides."""
    federation.adapters.joinpath("7").mkdir()
    base = model.fingerprint(tiny.base())["base"]
    return kind(federation.grid, RunConfig.read(federation.run_config), base, federation.adapters / "7")


def half_of(adapter: Adapter, half: str) -> Adapter:
    return {key: value for key, value in adapter.items() if f".lora_{half}." in key}


# --- one half a round -------------------------------------------------------------------------------------------------


def test_the_round_says_which_half_it_trains_and_no_other_strategy_has_any():
    assert [lora.half(ALTERNATE, number) for number in (1, 2, 3, 4)] == ["B", "A", "B", "A"]
    assert {lora.half(tiny.config(strategy=name), 1) for name in ("fedavg", "fedavgm", "median", "krum", "svd")} == {""}


def test_the_product_of_the_means_is_the_mean_of_the_products_in_either_half_by_hand():
    """By three images and one: ¾ · (2, 0) + ¼ · (0, 4) is B = (1.5, 1), then ¾ · (1, 1) + ¼ · (5, -3) is A = (2, 0)."""
    strategy, sent = Strategy(ALTERNATE), layer([[1.0, 0.0]], [[0.0], [0.0]])
    for number, half, parts, expected in (
        (1, "B", ([[2.0], [0.0]], [[0.0], [4.0]]), [[1.5, 0.0], [1.0, 0.0]]),
        (2, "A", ([[1.0, 1.0]], [[5.0, -3.0]]), [[3.0, 0.0], [2.0, 0.0]]),
    ):
        sites = [
            reply({f"l.lora_{half}.weight": torch.tensor(part)}, sent, site, images, half=half)
            for site, images, part in zip("ab", (3, 1), parts, strict=True)
        ]
        new = strategy.aggregate(number, sites[::-1], sent)
        assert product(new).tolist() == expected
        assert (0.75 * product(sites[0].trained) + 0.25 * product(sites[1].trained)).tolist() == expected
        assert products.lost(sites, sent, ALTERNATE) == pytest.approx(0, abs=1e-12)
        other = "l.lora_A.weight" if half == "B" else "l.lora_B.weight"
        assert torch.equal(new[other], sent[other])
        sent = new
    assert strategy.state() == {}


def test_the_half_that_nobody_trains_stays_to_the_bit_where_a_mean_of_it_would_not():
    sent = tiny.adapter(0)
    sites = [guard.Reply(f"s{n}", sent | half_of(tiny.adapter(n), "B"), 10 + n, {}) for n in range(1, 8)]
    new, plain = (Strategy(run).aggregate(1, sites, sent) for run in (ALTERNATE, tiny.CONFIG))
    assert tiny.equal(half_of(new, "A"), half_of(sent, "A")) and not tiny.equal(half_of(plain, "A"), half_of(sent, "A"))
    assert tiny.equal(half_of(new, "B"), half_of(plain, "B"))  # fedavg's own arithmetic on the other


def test_an_updates_length_is_that_of_the_half():
    sent = layer([[1.0, 0.0]], [[0.0], [0.0]])
    got = reply({"l.lora_B.weight": torch.tensor([[3.0], [4.0]])}, sent, half="B")
    assert got.norm == 5.0 and torch.equal(got.trained["l.lora_A.weight"], sent["l.lora_A.weight"])


@pytest.mark.parametrize("sends", ["the other half", "both", "nothing", "another shape"])
def test_a_site_that_sends_another_half_than_the_round_trains_is_refused(sends):
    sent = layer([[1.0, 0.0]], [[0.0], [0.0]])
    part = {"the other half": half_of(sent, "A"), "both": sent, "nothing": {}}.get(sends)
    part = {"l.lora_B.weight": torch.zeros(2, 2)} if part is None else part
    with pytest.raises(AdapterError, match="ADAPTER-01"):
        reply(part, sent, half="B")


def fitted(number: int, start: Adapter, private: bool = False, **changes) -> Adapter:
    """What a site makes of `start` in that round."""
    config = tiny.config(**{"strategy": "alternate", "local_steps": 2} | changes)
    net = tiny.unet(config)
    model.apply_adapter(net, start)
    what = net, diffusion.Objective.of(tiny.base()), encoded(), config, train.accelerator(config)
    if private:
        dp.fit(*what, Terms(6, 4, 1.0, 0.5), number)
    else:
        train.fit(*what, 1, number)
    return model.adapter_of(net)


@pytest.mark.parametrize("changes", [{}, {"proximal_mu": 1.0, "optimizer": "adafactor"}, {"private": True}])
@pytest.mark.parametrize(("number", "half", "other"), [(1, "B", "A"), (2, "A", "B")])
def test_a_site_moves_the_rounds_half_and_of_the_other_not_a_bit(number, half, other, changes):
    start = tiny.adapter(3)
    after = fitted(number, start, **changes)
    assert tiny.equal(half_of(after, other), half_of(start, other))
    assert not any(torch.equal(value, start[key]) for key, value in half_of(after, half).items())


def test_where_b_is_0_the_first_step_of_b_is_that_of_training_both():
    """A's gradient is 0 there, so that nothing but B moves either way."""
    both, one = (fitted(1, tiny.fresh(), local_steps=1, strategy=name) for name in ("fedavg", "alternate"))
    assert tiny.equal(both, one) and not tiny.equal(one, tiny.fresh())


def test_a_net_that_is_kept_trains_each_rounds_half_whatever_it_trained_before():
    net = tiny.unet(ALTERNATE)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    for number, half in ((1, "B"), (2, "A"), (2, "A"), (3, "B")):
        own = [names[id(parameter)] for parameter in factors.trained(net, ALTERNATE, number)]
        assert len(own) == len(tiny.fresh()) // 2 and all(f".lora_{half}." in name for name in own)


@pytest.mark.parametrize("name", kit.ALL)
def test_every_familys_net_trains_a_half_and_first_rows_and_nothing_else_moves(name):
    config = replace(family_config(name), strategy="svd", lora_rank=2, local_steps=1, batch_size=1)
    objective, net = train.load(kit.base(name), config, train.accelerator(config))
    what, before = (net, objective, photos(name)), model.adapter_of(net)
    with factors.narrowed(net, 1):
        train.fit(*what, config, train.accelerator(config), 1, 1)
    after = model.adapter_of(net)
    assert tiny.equal(lora.filled(lora.part(before, rank=1), after), before) and not tiny.equal(after, before)
    config = replace(config, strategy="alternate", rounds=4)
    for number, half, other in ((1, "B", "A"), (2, "A", "B")):
        before = model.adapter_of(net)
        train.fit(*what, config, train.accelerator(config), 1, number)
        after = model.adapter_of(net)
        assert tiny.equal(half_of(after, other), half_of(before, other))
        assert not tiny.equal(half_of(after, half), half_of(before, half))


SETTINGS = {"rounds": 2, "local_steps": 1, "strategy": "alternate", "sample_prompts": ""}


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A whole run of two rounds: B, A."""
    federation = Federation(tmp_path_factory.mktemp("turns"), **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        federation.go(patch)
    return federation


def test_half_of_the_adapter_travels_back_and_the_hub_moves_that_by_its_mean(turns):
    before, told = tiny.fresh(), turns.history()
    for number, half in ((1, "B"), (2, "A")):
        sent, came = (turns.grid.adapters(str(number), which) for which in (turns.grid.sent, turns.grid.came))
        assert all(tiny.equal(adapter, before) for adapter in sent.values())
        assert all(part.keys() == half_of(before, half).keys() for part in came.values())
        entry, new = told["rounds"][number - 1], store.read_adapter(turns.adapters / "7" / f"round-000{number}")
        images = {site: entry["sites"][site]["weight"] for site in sorted(came)}
        for key, value in new.items():
            parts = [came[site].get(key, before[key]).numpy() for site in images]
            shares = [np.float32(count / sum(images.values())) for count in images.values()]
            mean = sum(part * share for part, share in zip(parts, shares, strict=True))
            np.testing.assert_array_equal(value.numpy(), mean if f".lora_{half}." in key else before[key].numpy())
        assert 0 <= entry["aggregation_error"] < 1e-12
        before = new
    assert tiny.equal(store.read_adapter(turns.adapters / "7" / "final"), before)


def test_the_sites_journal_and_the_hubs_history_name_the_same_whole_adapter(turns):
    for site in turns.own:
        lines = {line["round"]: line["sent"] for line in journal.read(turns.root / "cache" / site)}
        assert [lines[entry["round"]] for entry in turns.history()["rounds"]] == [
            entry["adapters"][site] for entry in turns.history()["rounds"]
        ]


def test_a_run_that_is_taken_up_in_the_middle_ends_with_the_same_adapter_bit_for_bit(turns, tmp_path, monkeypatch):
    root = shutil.copytree(turns.root, tmp_path / "root", symlinks=True)
    again = Federation(tmp_path / "new", **SETTINGS)
    again.adapters = root / "adapters"
    for gone in ("round-0002", "final"):
        shutil.rmtree(again.adapters / "7" / gone)
    again.run_config["resume"] = "7"
    folder = again.go(monkeypatch, run_id=8)
    assert [number for _, number, _ in again.grid.sent] == ["2", "2", "3", "3"]
    for name in ("round-0001", "round-0002", "final"):
        kept = turns.adapters / "7" / name
        assert tiny.equal(store.read_adapter(folder / name), store.read_adapter(kept)), name


def test_updates_of_a_half_are_measured_by_those_of_the_same_half(tmp_path, monkeypatch):
    """Those of A are a hundred times as long: of the run's three last rounds together, the median is B's."""
    federation = Federation(tmp_path, strategy="alternate", rounds=4)
    one = Exchange(federation.grid, federation.config(strategy="alternate"), "", tmp_path)
    lengths = {"B": 1.0, "A": 100.0}

    def send(kind, number, adapter, attempt):
        return [guard.Reply(site, {}, 1, {}, lengths[lora.half(ALTERNATE, number)]) for site in "ab"], []

    monkeypatch.setattr(one, "send", send)
    for number in (1, 2, 3, 4):
        kept, refused = one.round(number, {})
        assert len(kept) == 2 and not refused
    lengths["B"] = 6.0
    assert [entry.reason[:10] for entry in one.attempt(5, {}, 0)[1]] == ["ADAPTER-04"] * 2


def test_while_the_rate_rises_from_0_no_round_is_measured_by_the_shorter_updates_before(tmp_path, monkeypatch):
    """Of one step a round and five of warm-up the first is none at all, and the second endlessly longer; round 6 is
    measured by nothing, and 7 by that.
    """
    federation = Federation(tmp_path)
    config = federation.config(local_steps=1, warmup_steps=5)
    one, lengths = Exchange(federation.grid, config, "", tmp_path), [0.0, 0.01, 0.1, 0.2, 0.4, 1.0]

    def send(kind, number, adapter, attempt):
        return [guard.Reply(site, {}, 1, {}, lengths[number - 1]) for site in "ab"], []

    monkeypatch.setattr(one, "send", send)
    for number in range(1, 7):
        kept, refused = one.round(number, {})
        assert len(kept) == 2 and not refused
    lengths.append(6.0)
    assert [entry.reason[:10] for entry in one.attempt(7, {}, 0)[1]] == ["ADAPTER-04"] * 2


# --- a site of a lower rank -------------------------------------------------------------------------------------------


def test_a_part_is_the_first_rows_of_a_and_columns_of_b_and_filled_puts_it_back():
    whole = layer([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]])
    part = lora.part(whole, rank=1)
    assert {key: value.tolist() for key, value in part.items()} == {
        "l.lora_A.weight": [[1.0, 2.0]], "l.lora_B.weight": [[5.0], [7.0]],
    }  # fmt: skip
    back = lora.filled(layer([[9.0, 9.0]], [[0.0], [0.0]]), whole)
    assert back["l.lora_A.weight"].tolist() == [[9.0, 9.0], [3.0, 4.0]]
    assert back["l.lora_B.weight"].tolist() == [[0.0, 6.0], [0.0, 8.0]]
    assert whole["l.lora_A.weight"][0].tolist() == [1.0, 2.0]
    assert tiny.equal(lora.part(whole, rank=5), whole)  # a layer of a lower rank already


def test_sites_of_rank_1_and_2_have_the_mean_of_their_products_by_hand():
    """Sent is diag(3, 1). Of it a has trained the first direction to (3, 3), and b has made diag(1, 3): the second
    direction, which a did not train, counts at a as it was sent.
    """
    sent = layer([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]])
    one = reply(layer([[1.0, 1.0]], [[3.0], [0.0]]), sent, "a", rank=1, lower=True)
    two = reply(layer([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]), sent, "b", lower=True)
    assert product(one.trained).tolist() == [[3.0, 3.0], [0.0, 1.0]] and (one.rank, two.rank) == (1, 0)
    assert (one.norm, two.norm) == (1.0, pytest.approx(8**0.5))
    assert (one.pace, two.pace) == (pytest.approx(2**0.5), two.norm)  # a has trained 4 of the 8 numbers
    new = Strategy(SVD).aggregate(1, [one, two], sent)
    torch.testing.assert_close(product(new), torch.tensor([[2.0, 1.5], [0.0, 2.0]]))
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in sent.items()}


def test_an_update_of_the_runs_rank_is_not_refused_for_being_longer_than_those_of_a_lower_one():
    """A number moves about as far whatever the rank, so that 64 times as many make an update 8 times as long."""
    low = [guard.Reply(site, {}, 1, {}, norm=1.0, rank=1, share=1 / 64) for site in "abc"]
    whole, long = (guard.Reply(site, {}, 1, {}, norm=norm) for site, norm in (("d", 8.0), ("e", 41.0)))
    kept, refused = guard.guard_norms([*low, whole, long], [], 5.0)
    assert [reply.site for reply in kept] == ["a", "b", "c", "d"] and [reply.site for reply, _ in refused] == ["e"]


def test_what_a_low_rank_trains_first_is_the_best_of_that_rank_in_what_svd_sends():
    """Numpy's own nearest: a run's adapter has its directions in the order of their weight."""
    sites = [guard.Reply(f"s{n}", tiny.adapter(n), 1 + n, {}) for n in (1, 2)]
    new = Strategy(SVD).aggregate(1, sites, tiny.adapter(1))
    for name in lora.ranks_of(new):
        whole, first = (
            (a[f"{name}.lora_B.weight"].double().flatten(1) @ a[f"{name}.lora_A.weight"].double().flatten(1)).numpy()
            for a in (new, lora.part(new, rank=1))
        )
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        np.testing.assert_allclose(first, u[:, :1] * s[:1] @ v[:1], atol=1e-5)


@pytest.mark.parametrize("rank", [-1, 3, "1", 1.0, [1]])
def test_a_rank_that_the_run_has_no_room_for_is_refused(rank):
    sent = layer([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]])
    with pytest.raises(HubError, match="HUB-05") as caught:
        reply(lora.part(sent, rank=1), sent, rank=rank, lower=True)
    assert "has no room for" in str(caught.value)


def test_a_site_whose_tensors_are_not_of_the_rank_that_it_says_is_refused():
    sent = layer([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]])
    for rank, part in ((1, sent), (None, lora.part(sent, rank=1)), (2, lora.part(sent, rank=1))):
        with pytest.raises(AdapterError, match="ADAPTER-01"):
            reply(part, sent, rank=rank, lower=True)


def test_no_strategy_but_svd_takes_a_rank_below_the_runs(tmp_path):
    sent = layer([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]])
    with pytest.raises(HubError, match="HUB-05") as caught:
        reply(lora.part(sent, rank=1), sent, rank=1)
    assert "svd alone" in str(caught.value)


def test_a_site_says_its_rank_in_its_limits_and_refuses_a_run_that_cannot_take_it_before_it_trains():
    own = Limits.read("rank=3 max-local-steps=200 rank=2")
    assert own.rank == own.private().rank == own.silent().rank == 2
    own.check(tiny.config(strategy="svd", lora_rank=16))
    own.check(tiny.config(strategy="fedavg", lora_rank=2))  # no less than the run's
    for run in (tiny.config(lora_rank=3), tiny.config(lora_rank=2, rank_pattern="attn2=4"), ALTERNATE):
        if run is ALTERNATE:
            own.check(run)  # of rank 2
            continue
        with pytest.raises(SiteError, match="TRUST-03") as caught:
            own.check(run)
        assert "rank=2, which strategy=svd alone can take" in caught.value.report()
    assert [own.lowered(tiny.config(lora_rank=rank)) for rank in (1, 2, 3)] == [0, 0, 2]
    for slip in ("rank=0", "rank=-1", "rank=many", "rank=", "rank", "rank=1.5"):
        with pytest.raises(SiteError, match="TRUST-04"):
            Limits.read(slip)


@pytest.mark.parametrize("changes", [{}, {"lora_alpha": 3.0, "lora_scaling": "rs", "optimizer": "adafactor"}])
@pytest.mark.parametrize("private", [False, True])
def test_the_first_rows_train_while_the_net_computes_what_the_whole_adapter_says(changes, private):
    config, start = tiny.config(strategy="svd", local_steps=2, proximal_mu=1.0, **changes), tiny.adapter(3)
    net, what = tiny.unet(config), diffusion.Objective.of(tiny.base())
    model.apply_adapter(net, start)
    own = dict(net.named_parameters())

    def said() -> float:
        photos = encoded()
        return diffusion.validation_loss(net.eval(), what, photos, torch.device("cpu"), timesteps=1, batch_size=6)

    before = said()
    with factors.narrowed(net, 1):
        assert said() == before
        assert {p.numel() for p in factors.trained(net, config, 1)} < {
            value.numel() // 2 for value in start.values()
        } | {0}
        given = net, what, encoded(), config, train.accelerator(config)
        dp.fit(*given, Terms(6, 4, 1.0, 0.5), 1) if private else train.fit(*given, 1, 1)
    after = model.adapter_of(net)
    assert {name: id(p) for name, p in net.named_parameters()} == {name: id(p) for name, p in own.items()}
    first, kept = lora.part(start, rank=1), lora.filled(lora.part(start, rank=1), after)
    assert tiny.equal(kept, start)  # but for the first rows and columns all is as it was
    assert not any(torch.equal(value, first[key]) for key, value in lora.part(after, rank=1).items())
    model.apply_adapter(net, start)  # the next round's
    assert said() == before


def test_a_site_of_a_lower_rank_sends_that_and_the_round_ends_with_one_adapter_of_the_runs(tmp_path, monkeypatch):
    federation, sent = Federation(tmp_path, local_steps=1, strategy="svd"), tiny.adapter(3)
    federation.own["site-2"]["limits"] = "rank=1"
    replies, refused = exchange(Exchange, federation, monkeypatch).round(1, sent)
    assert not refused and [server_app.said_of(reply).rank for reply in replies] == [None, 1]
    came = federation.grid.adapters("1", federation.grid.came)
    assert set(lora.ranks_of(came["site-1"]).values()) == {2} and set(lora.ranks_of(came["site-2"]).values()) == {1}
    for reply in replies:
        assert tiny.equal(lora.part(reply.trained), lora.filled(came[reply.site], sent))
    new = Strategy(SVD).aggregate(1, replies, sent)
    model.check_adapter(new, sent)
    assert not tiny.equal(new, sent)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_hidden_half_is_half_of_the_numbers_and_the_hub_moves_it_alone(tmp_path, monkeypatch):
    federation, sent = with_masks(tmp_path, local_steps=1, strategy="alternate"), tiny.adapter(3)
    sums = exchange(Sums, federation, monkeypatch)
    replies, refused = sums.round(2, sent)
    assert len(replies) == 3 and not refused
    came = federation.grid.adapters("2", federation.grid.came)
    numbers = sum(value.numel() for value in half_of(sent, "A").values())
    assert {part[masks.NAME].numel() for part in came.values()} == {numbers}
    mean = masks.mean((masks.unpacked(part) for part in came.values()), 16.0)
    new = Strategy(ALTERNATE).aggregate(2, sums.summed, sent)
    assert np.abs(mean).max() > 0 and tiny.equal(half_of(new, "A"), masks.moved(half_of(sent, "A"), mean))
    assert tiny.equal(half_of(new, "B"), half_of(sent, "B"))


# --- what goes with what ----------------------------------------------------------------------------------------------


def refused(run: dict[str, object]) -> BouquetError:
    with pytest.raises(BouquetError) as caught:
        RunConfig.read(run)
    assert caught.value.code == "CONFIG-02"
    return caught.value


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ({"server-learning-rate": 0.5}, "server-learning-rate"),
        ({"strategy": "svd", "server-momentum": 0.5}, "server-momentum"),
        ({"strategy": "median", "min-sites": 3, "trimmed-share": 0.3}, "trimmed-share"),
        ({"strategy": "fedadam", "krum-malicious": 2}, "krum-malicious"),
        ({"update-clip": 4.0}, "update-clip"),
    ],
)
def test_a_key_that_the_run_would_not_read_is_refused_where_it_is_not_its_default(run, key):
    assert key in str(refused(run)) and "alone read it" in refused(run).fix


@pytest.mark.parametrize(
    ("run", "least"),
    [
        ({"strategy": "median"}, 3),
        ({"strategy": "trimmed-mean"}, 5),  # a fifth of five is one
        ({"strategy": "trimmed-mean", "trimmed-share": 0.4}, 3),
        ({"strategy": "trimmed-mean", "trimmed-share": 0.1}, 10),
        ({"strategy": "krum"}, 5),
        ({"strategy": "krum", "krum-malicious": 2}, 7),
        ({"strategy": "krum", "krum-malicious": 0}, 3),
    ],
)
def test_a_strategy_against_hostile_sites_needs_as_many_as_it_can_outvote_them_with(run, least):
    assert "min-sites" in str(refused(run | {"min-sites": least - 1}))
    assert RunConfig.read(run | {"min-sites": least}).min_sites == least


def test_a_mean_that_nothing_is_cut_from_and_one_round_of_halves_are_refused():
    assert "trimmed-share" in str(refused({"strategy": "trimmed-mean", "trimmed-share": 0.0, "min-sites": 9}))
    assert "rounds" in str(refused({"strategy": "alternate", "rounds": 1}))
