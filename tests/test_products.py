"""What averaging A and B apart loses: by hand, against dense products, and in the records of a run."""

from __future__ import annotations

import math

import pytest
import torch

from app import lora, model
from app.adapter import store
from app.config import RunConfig
from app.errors import ConfigError
from app.hub import guard, products, spool
from app.hub.spool import Spool
from app.hub.strategy import Strategy
from app.model import Adapter
from bouquet.hub import status
from bouquet.report.page import averaging, page
from bouquet.report.reading import read
from tests.kit import tiny
from tests.kit.memory import Federation


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> None:
    tiny.be_the_hub(monkeypatch)


ONE = tiny.config(lora_rank=1)


def corner(at: int) -> Adapter:
    """One layer of rank 1 whose product is 1 at (at, at) and 0 elsewhere, of 2×2."""
    unit = torch.eye(2)[at]
    return {"l.lora_A.weight": unit[None], "l.lora_B.weight": unit[:, None]}


def reply(site: str, images: int, adapter: Adapter) -> guard.Reply:
    return guard.Reply(site, adapter, images, {})


def dense(adapters: list[Adapter], weights: list[float], scales: dict[str, float]) -> float:
    """The same by whole products, layer by layer."""
    apart = together = 0.0
    for layer, scale in scales.items():
        downs, ups = ([a[f"{layer}.lora_{end}.weight"].double().flatten(1).numpy() for a in adapters] for end in "AB")
        mean = sum(w * up @ down for w, up, down in zip(weights, ups, downs, strict=True))
        up, down = (sum(w * f for w, f in zip(weights, factors, strict=True)) for factors in (ups, downs))
        apart += scale**2 * ((up @ down - mean) ** 2).sum()
        together += scale**2 * (mean**2).sum()
    return math.sqrt(apart / together)


def test_two_sites_that_learned_other_corners_by_hand():
    """The mean of the products is ½ at two corners, ‖·‖² = ½; the product of the means ¼ everywhere, ¼ away at all."""
    found = products.lost([reply("a", 5, corner(0)), reply("b", 5, corner(1))], corner(0), ONE)
    assert found == pytest.approx(math.sqrt(0.25 / 0.5))


def test_a_site_of_three_times_the_images_counts_three_times():
    """¾ and ¼ at the corners, ‖·‖² = 10/16; 9/16, 3/16, 3/16, 1/16 of the means': 3/16 away at all four."""
    both = [reply("a", 30, corner(0)), reply("b", 10, corner(1))]
    assert products.lost(both, corner(0), ONE) == pytest.approx(math.sqrt(4 * (3 / 16) ** 2 / (10 / 16)))
    for name in products.ALIKE:  # which count each site alike
        run = tiny.config(lora_rank=1, strategy=name)
        assert products.lost(both, corner(0), run) == pytest.approx(math.sqrt(0.5))
    assert products.lost(both, corner(0), tiny.config(lora_rank=1, strategy="krum")) is None


def test_nothing_is_lost_by_one_site_nor_where_all_agree_in_one_factor_and_of_nothing_nothing_is_said():
    one = tiny.adapter(1)
    assert products.lost([reply("a", 5, one)], one, tiny.CONFIG) == pytest.approx(0, abs=1e-12)
    other = {key: value if ".lora_A." in key else 3 * value for key, value in one.items()}
    assert products.lost([reply("a", 5, one), reply("b", 2, other)], one, tiny.CONFIG) == pytest.approx(0, abs=1e-12)
    fresh = tiny.fresh()  # B is 0
    assert products.lost([reply("a", 5, fresh), reply("b", 2, fresh)], fresh, tiny.CONFIG) is None


@pytest.mark.parametrize(
    "changes", [{}, {"lora_targets": "attention"}, {"rank_pattern": "attn2=5", "lora_alpha": 3.0, "lora_scaling": "rs"}]
)
def test_linear_layers_and_convolutions_of_any_rank_and_scale_against_dense_products(changes):
    run = tiny.config(**changes)
    adapters = [tiny.adapter(seed, run) for seed in (1, 2, 3)]
    found = products.lost([reply(str(n), (1, 2, 5)[n], each) for n, each in enumerate(adapters)], adapters[0], run)
    scales = lora.scales(adapters[0], run)
    assert found == pytest.approx(dense(adapters, [1 / 8, 2 / 8, 5 / 8], scales), rel=1e-9)
    if "rank_pattern" in changes:  # which gives layers other scales, so that these count
        unscaled = dense(adapters, [1 / 8, 2 / 8, 5 / 8], dict.fromkeys(scales, 1.0))
        assert len(set(scales.values())) == 2 and found != pytest.approx(unscaled, rel=1e-4)


def test_a_difference_that_is_a_millionth_is_told_to_its_digits():
    one = tiny.adapter(1)
    other = {key: value + 1e-3 * tiny.adapter(2)[key] for key, value in one.items()}
    found = products.lost([reply("a", 1, one), reply("b", 1, other)], one, tiny.CONFIG)
    by_hand = dense([one, other], [0.5, 0.5], dict.fromkeys(lora.ranks_of(one), 1.0))
    assert found < 1e-5 and found == pytest.approx(by_hand, rel=1e-6)


def test_replies_in_files_a_few_layers_at_a_time_and_in_another_order_give_the_same_number(tmp_path, monkeypatch):
    adapters = [tiny.adapter(seed) for seed in (1, 2, 3)]
    whole = products.lost([reply(f"s{n}", n + 1, each) for n, each in enumerate(adapters)], adapters[0], tiny.CONFIG)
    folder = Spool(tmp_path)
    kept = [reply(f"s{n}", n + 1, folder.keep(n, each)) for n, each in enumerate(adapters)]
    monkeypatch.setattr(spool, "MOST", 1)
    assert products.lost(kept[::-1], adapters[0], tiny.CONFIG) == whole


def test_with_very_many_sites_it_is_told_within_some_per_cent(monkeypatch):
    adapters = [tiny.adapter(seed) for seed in range(12)]
    replies = [reply(f"s{n:02}", 1 + n % 3, each) for n, each in enumerate(adapters)]
    exact = products.lost(replies, adapters[0], tiny.CONFIG)
    monkeypatch.setattr(products, "WIDEST", 1)
    probed = products.lost(replies, adapters[0], tiny.CONFIG)
    assert probed != exact and probed == pytest.approx(exact, rel=0.05)
    assert probed == products.lost(replies, adapters[0], tiny.CONFIG)


# --- the strategy svd -------------------------------------------------------------------------------------------------

SVD = {"strategy": "svd"}


def product(adapter: Adapter, layer: str = "l") -> torch.Tensor:
    up, down = (adapter[f"{layer}.lora_{end}.weight"].double().flatten(1) for end in "BA")
    return up @ down


def test_the_mean_of_two_corners_cut_to_rank_1_is_the_heavier_corner_by_hand():
    """¾ and ¼ on the diagonal: of rank 1 the nearest has ¾ alone, and leaves ¼ of √(10/16) out. A is as long as the
    mean A, √(9/16 + 1/16).
    """
    both = [reply("a", 30, corner(0)), reply("b", 10, corner(1))]
    new = Strategy(tiny.config(lora_rank=1, **SVD)).aggregate(1, both, corner(0))
    torch.testing.assert_close(product(new), torch.tensor([[0.75, 0.0], [0.0, 0.0]], dtype=torch.float64))
    assert float(new["l.lora_A.weight"].norm()) == pytest.approx(math.sqrt(10 / 16))
    lost = products.lost(both, corner(0), tiny.config(lora_rank=1, **SVD))
    assert lost == pytest.approx(0.25 / math.sqrt(10 / 16))


def test_what_fits_into_the_rank_is_kept_whole_and_an_unused_direction_can_still_be_learned():
    """Corners 0 and 1 with room for three: the mean of the products exactly, and a third row of A with a B of 0."""
    room = {"l.lora_A.weight": torch.zeros(3, 4), "l.lora_B.weight": torch.zeros(4, 3)}
    sites = []
    for at in (0, 1):
        site = {key: value.clone() for key, value in room.items()}
        site["l.lora_A.weight"][0, at] = site["l.lora_B.weight"][at, 0] = 1.0
        site["l.lora_A.weight"][1, 3] = 2.0  # whose B is 0
        sites.append(reply(str(at), 5, site))
    run = tiny.config(lora_rank=3, **SVD)
    new = Strategy(run).aggregate(1, sites, room)
    torch.testing.assert_close(product(new), torch.diag(torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64)))
    rows = new["l.lora_A.weight"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(3) * float(rows[0].square().sum()))
    assert products.lost(sites, room, run) == pytest.approx(0, abs=1e-7)


def test_every_layer_of_a_net_is_numpys_nearest_of_its_rank():
    import numpy as np

    run = tiny.config(lora_rank=2, **SVD)
    adapters = [tiny.adapter(seed, run) for seed in (1, 2, 3)]
    sites = [reply(f"s{n}", (1, 2, 5)[n], each) for n, each in enumerate(adapters)]
    new, left_out, whole = Strategy(run).aggregate(1, sites[::-1], adapters[0]), 0.0, 0.0
    assert {key: value.shape for key, value in new.items()} == {key: value.shape for key, value in adapters[0].items()}
    for layer in lora.ranks_of(new):
        mean = sum(w / 8 * product(each, layer).numpy() for w, each in zip((1, 2, 5), adapters, strict=True))
        u, s, v = np.linalg.svd(mean, full_matrices=False)
        np.testing.assert_allclose(product(new, layer).numpy(), u[:, :2] * s[:2] @ v[:2], atol=1e-5)
        left_out, whole = left_out + (s[2:] ** 2).sum(), whole + (s**2).sum()
    assert products.lost(sites, adapters[0], run) == pytest.approx(math.sqrt(left_out / whole), rel=1e-6)


def test_a_layer_narrower_than_its_rank_is_padded():
    wide = {"l.lora_A.weight": torch.ones(3, 2), "l.lora_B.weight": torch.ones(2, 3)}
    new = Strategy(tiny.config(lora_rank=3, **SVD)).aggregate(1, [reply("a", 1, wide)], wide)
    assert new["l.lora_A.weight"].shape == (3, 2) and new["l.lora_B.weight"].shape == (2, 3)
    torch.testing.assert_close(product(new), 3 * torch.ones(2, 2, dtype=torch.float64))


def test_nothing_but_the_adapter_is_kept_between_rounds_so_that_a_run_that_goes_on_does_so_bit_for_bit():
    run = tiny.config(**SVD)
    first, second = ([reply(f"s{n}", 1 + n, tiny.adapter(seed + n)) for n in range(3)] for seed in (1, 11))
    strategy = Strategy(run)
    between = strategy.aggregate(1, first, tiny.fresh())
    assert strategy.state() == {}
    whole = strategy.aggregate(2, second, between)
    assert tiny.equal(whole, Strategy(run, {}).aggregate(2, second[::-1], between))


def test_a_run_by_svd_writes_what_its_sites_products_come_to(tmp_path, monkeypatch):
    federation = Federation(tmp_path, sample_prompts="", rounds=1, **SVD)
    folder = federation.go(monkeypatch)
    entry, sent = federation.history()["rounds"][0], federation.grid.adapters("1", federation.grid.came)
    sites = [reply(site, entry["sites"][site]["weight"], adapter) for site, adapter in sent.items()]
    by_hand = products.folded(sites, sites[0].trained)
    assert entry["adapter"] == model.adapter_hash(by_hand) and tiny.equal(store.read_adapter(folder / "final"), by_hand)
    assert 0 < entry["aggregation_error"] == products.lost(sites, by_hand, tiny.config(**SVD)) < 1


@pytest.mark.parametrize("other", [{"ema-decay": 0.5}, {"secrecy": "masks", "min-sites": 3, "norm-bound": 0.0}])
def test_svd_is_refused_with_what_it_cannot_be_with(other):
    with pytest.raises(ConfigError, match="CONFIG-02"):
        RunConfig.read({"strategy": "svd"} | other)


# --- where it is told -------------------------------------------------------------------------------------------------


def test_each_round_of_a_run_has_its_number_in_history_status_and_report(tmp_path, monkeypatch):
    federation = Federation(tmp_path, sample_prompts="", rounds=2)
    folder = federation.go(monkeypatch)
    told = federation.history()
    for entry in told["rounds"]:
        sent = federation.grid.adapters(str(entry["round"]), federation.grid.came)
        images = [entry["sites"][site]["weight"] for site in sent]
        weights = [count / sum(images) for count in images]
        scales = dict.fromkeys(lora.ranks_of(next(iter(sent.values()))), 1.0)
        assert entry["aggregation_error"] == pytest.approx(dense(list(sent.values()), weights, scales), rel=1e-6)
        assert entry["aggregation_error"] > 0
    run, last = read(folder), told["rounds"][-1]["aggregation_error"]
    assert f"averaging lost {last:.1%} of the mean" in status.words(status.tell(run, "finished", "", {}))
    assert averaging(run)["last"] == f"{100 * last:.2g} %" and "What averaging lost in each round" in page(run)
