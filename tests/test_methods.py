"""benchmarks/learning/methods: each method's averaging by hand, what a round of it moves, and what its table says."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import sh

from app import lora, model
from app.hub.guard import Reply
from app.model import Adapter
from app.site import train
from benchmarks.learning import averaging, methods, order, photos
from benchmarks.learning.methods import METHODS, Cell, Sizes
from bouquet import ROOT
from models.mini import draw, learned
from tests.kit import tiny

SIZES = Sizes(8, 15, 8, 120, 12, 10)


def corner(at: int) -> Adapter:
    """One layer of rank 1 whose product is 1 at (at, at) and 0 elsewhere, of 2×2."""
    unit = torch.eye(2)[at]
    return {"l.lora_A.weight": unit[None], "l.lora_B.weight": unit[:, None]}


def replies(one: int, other: int) -> list[Reply]:
    return [Reply("a", corner(0), one, {}), Reply("b", corner(1), other, {})]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_stacked_is_the_mean_of_the_products_counted_by_images():
    """30 and 10 images at the two corners, in a layer that counts twice: 2 · (¾ and ¼)."""
    assert torch.equal(averaging.stacked(replies(30, 10), {"l": 2.0})["l"], torch.diag(torch.tensor([1.5, 0.5])))


def test_exact_puts_into_the_base_what_the_product_of_the_means_lacks():
    """The means are [½ ½] and its transpose, whose product is ¼ everywhere; the products' mean is ½ at two corners."""
    adapter, dense = averaging.exact(replies(5, 5), {"l": 1.0})
    assert torch.equal(adapter["l.lora_A.weight"], torch.tensor([[0.5, 0.5]]))
    assert torch.equal(adapter["l.lora_B.weight"], torch.tensor([[0.5], [0.5]]))
    assert torch.equal(dense["l"], torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))
    twice = averaging.exact(replies(5, 5), {"l": 2.0})[1]["l"]
    assert torch.equal(twice, 2 * dense["l"])  # the layer counts its product twice


def test_sites_that_share_a_half_lose_nothing_by_averaging_the_other():
    """Both have A = [1 2]; B is [1 0]ᵀ and [0 3]ᵀ, half of each: ½ 1 and 3/2 2 of it, and nothing for the base."""
    down = torch.tensor([[1.0, 2.0]])
    ups = (torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [3.0]]))
    both = [Reply(str(i), {"l.lora_A.weight": down, "l.lora_B.weight": up}, 1, {}) for i, up in enumerate(ups)]
    adapter, dense = averaging.exact(both, {"l": 1.0})
    assert torch.equal(averaging.product(adapter, "l"), torch.tensor([[0.5, 1.0], [1.5, 3.0]]).double())
    assert not dense["l"].any()


def test_a_fresh_adapter_has_no_b_and_an_a_as_pefts_own():
    adapter = {"l.lora_A.weight": torch.zeros(16, 4096), "l.lora_B.weight": torch.ones(8, 16)}
    found = averaging.fresh(adapter, 1)
    assert not found["l.lora_B.weight"].any()
    assert found["l.lora_A.weight"].std().item() == pytest.approx(1 / 16, rel=0.01)
    assert not torch.equal(found["l.lora_A.weight"], averaging.fresh(adapter, 2)["l.lora_A.weight"])


def test_decay_takes_its_share_of_the_product_and_leaves_a_as_it_is():
    """B·A is 3 · 2 = 6 in the one number, of which 5 % are 0.3."""
    shrunk = averaging.shrunk(
        {"l.lora_A.weight": torch.tensor([[2.0]]), "l.lora_B.weight": torch.tensor([[3.0]])}, 0.05
    )
    assert averaging.product(shrunk, "l").item() == pytest.approx(5.7)
    assert shrunk["l.lora_A.weight"].item() == 2


def test_what_is_sent_is_the_halves_that_were_trained():
    adapter = {"l.lora_A.weight": torch.zeros(2, 10), "l.lora_B.weight": torch.zeros(5, 2)}  # 80 and 40 bytes
    assert [averaging.sent(adapter, halves) for halves in ("AB", "A", "B")] == [120, 80, 40]


# --- on a net ---------------------------------------------------------------------------------------------------------


def said(net: torch.nn.Module) -> torch.Tensor:
    latents, text = tiny.batch(2)
    with torch.no_grad():
        return net.eval()(latents, torch.tensor([3, 500]), text).sample


def test_a_product_in_the_base_says_what_peft_says_with_the_adapter_convolutions_too():
    config = tiny.config(lora_alpha=6.0)  # each layer counts three times
    net, adapter = tiny.unet(config), tiny.adapter(1, config)
    plain = said(net)
    model.apply_adapter(net, adapter)
    with_adapter = said(net)
    model.apply_adapter(net, averaging.fresh(adapter, 1))
    assert torch.equal(said(net), plain)
    averaging.into_base(net, averaging.stacked([Reply("a", adapter, 5, {})], lora.scales(adapter, config)))
    assert (with_adapter - plain).abs().max() > 0.1
    torch.testing.assert_close(said(net), with_adapter, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sites of eight photos each."""
    home = tmp_path_factory.mktemp("sites")
    return [tiny.site(home / f"site-{number}", 8, number) for number in (1, 2)]


def ends(folders, name: str, rounds: int = 1) -> tuple[torch.nn.Module, float]:
    from app.config import RunConfig

    method = METHODS[name]
    config = RunConfig.read(tiny.RUN | {"rounds": rounds, "local-steps": 2} | method.run)
    sites = [train.Site(config, tiny.models(), folder, folder.parent / "cache" / folder.name, "") for folder in folders]
    return methods.federated(sites, config, method)


def test_after_one_round_exact_and_flora_are_the_same_net_and_fedavg_is_another(folders):
    """Both are the mean of the sites' products, the one beside an adapter and the other without."""
    exact, flora, fedavg = (said(ends(folders, name)[0]) for name in ("exact", "flora", "fedavg"))
    torch.testing.assert_close(exact, flora, rtol=1e-4, atol=1e-5)
    assert (exact - fedavg).abs().max() > 1e-4


def test_one_site_alone_loses_nothing_so_exact_is_fedavg(folders):
    fedavg, exact = (said(ends(folders[:1], name, 2)[0]) for name in ("fedavg", "exact"))
    torch.testing.assert_close(exact, fedavg, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rounds_in_turn_move_b_then_a_and_send_half_of_the_bytes_of_both(folders):
    start = tiny.fresh()
    one, first = ends(folders, "ffa", 1)
    two, mean = ends(folders, "alternate", 2)
    b_alone, sent = ends(folders, "ffa", 2)
    after = {name: model.adapter_of(net) for name, net in (("one", one), ("two", two), ("ffa", b_alone))}
    assert all(
        torch.equal(after[name][key], start[key]) for name in ("one", "ffa") for key in start if ".lora_A." in key
    )
    assert all(after[name][key].any() for name in after for key in start if ".lora_B." in key)
    assert all(not torch.equal(after["two"][key], start[key]) for key in start if ".lora_A." in key)
    whole = sum(value.nbytes for value in start.values())
    assert first == sent == averaging.sent(start, "B") and 2 * mean == whole
    assert ends(folders, "fedavg", 1)[1] == whole


# --- the order of the photos ------------------------------------------------------------------------------------------

KINDS = ("lily", "lily", "lily", "lily", "rose", "rose")
SHUFFLED = torch.tensor([5, 0, 3, 4, 1, 2])


@pytest.mark.parametrize(
    ("how", "arranged"),
    [
        ("known last", [0, 3, 1, 2, 5, 4]),
        # lilies at 1/8, 3/8, 5/8, 7/8 of the pass: 0, 3, 1, 2; roses at 1/4 and 3/4: 5, 4
        ("even", [0, 5, 3, 1, 4, 2]),
    ],
)
def test_a_pass_over_the_photos_is_arranged_by_what_they_show_and_stays_shuffled_within_that(how, arranged):
    assert order.arranged(SHUFFLED, KINDS, how, ("rose",)).tolist() == arranged


def test_even_batches_have_their_share_of_each_kind(monkeypatch):
    monkeypatch.setattr(train, "_shuffled", partial(order.shuffled, KINDS, "even", ()))
    batches = train._batches(6, 3, torch.Generator().manual_seed(1))
    assert [sorted(KINDS[n] for n in next(batches)) for _ in range(4)] == [["lily", "lily", "rose"]] * 4


def test_photos_of_which_nobody_said_what_they_show_are_no_order():
    with pytest.raises(ValueError, match="7 photos come to the steps, and of 6 it is known"):
        order.shuffled(KINDS, "even", (), 7, torch.Generator())


def test_an_order_takes_every_photo_as_often_and_another_way(folders, monkeypatch):
    """Of what a round's steps are given; the shuffle is there again afterwards."""
    site = train.Site(
        tiny.config(batch_size=2, local_steps=4), tiny.models(), folders[0], folders[0].parent / "cache/order", ""
    )
    taken, batch = [], type(site.train).batch
    monkeypatch.setattr(
        type(site.train), "batch", lambda self, pick, *rest: (taken.extend(pick.tolist()), batch(self, pick, *rest))[1]
    )
    kinds = {key: "rose" if number % 2 else "lily" for number, key in enumerate(site.train.keys)}
    for how in ("", "known last", ""):
        with order.ordered(how, kinds, ("rose",)):
            site.fit(seed=1)
    count = len(kinds)
    first, last, again = (taken[at : at + 8] for at in (0, 8, 16))
    assert count <= 8 and sorted(last[:count]) == list(range(count))
    assert [number % 2 for number in last[:count]] == sorted(number % 2 for number in range(count))
    assert first == again != last


# --- the photos -------------------------------------------------------------------------------------------------------


def test_every_photo_is_one_sites_and_few_sites_have_all_kinds():
    kinds = [photos.NEW[number % 4] for number in range(384)]
    sites = photos.divided(kinds, 4, photos.ALPHA, photos.SEED)
    assert sorted(row for site in sites for row in site) == list(range(384))
    most = [Counter(kinds[row] for row in site).most_common(2) for site in sites]
    assert sum(sum(count for _, count in two) >= 0.9 * len(site) for two, site in zip(most, sites, strict=True)) >= 3
    assert sites == photos.divided(kinds, 4, photos.ALPHA, photos.SEED)


def test_a_folder_is_drawn_once_with_its_class_images_apart_and_all_of_it_public(tmp_path):
    from app.site import privacy
    from app.site.photos import data, prior

    pictures = draw.photos(("lily",), 3, 1)
    folder = learned.write(tmp_path / "site-1", pictures, draw.photos(("rose",), 2, 1))
    found, classes = data.scan(folder).photos, prior.scan(folder).photos
    assert (len(found), len(classes)) == (3, 2) and all("lily" in p.captions[0] for p in found)
    assert privacy.is_public(folder, (*found, *classes))
    assert np.array_equal(np.asarray(found[0].read()), np.asarray(pictures[0][0]))
    assert learned.write(folder, []) == folder and len(data.scan(folder).photos) == 3


def test_sites_of_the_division_have_what_their_shares_say_and_one_photo_in_five_of_a_known_species(tmp_path):
    from app.site.photos import data

    setting = photos.dirichlet(tmp_path, 1, 15, 1)
    assert len(setting.folders) == 4 and setting.held_out.keys() == {*draw.SPECIES}
    new = 0
    for folder, shares in zip(setting.folders, setting.shares, strict=True):
        seen = Counter(photo.captions[0].split(",")[0].split()[-1] for photo in data.scan(folder).photos)
        own = {kind: number for kind, number in seen.items() if kind in photos.NEW}
        assert {kind: number / sum(own.values()) for kind, number in own.items()} == pytest.approx(shares)
        assert sum(seen.values()) - sum(own.values()) == max(4, sum(own.values()) // 4)
        new += sum(own.values())
    assert new == 48


def test_photographs_of_the_classes_with_most_go_to_the_sites_in_turn_and_other_ones_are_held_out(
    tmp_path, monkeypatch
):
    """Of four classes with 4, 3, 2 and 1 photos the sites have the first and the second; `test` has one of each.
    The base knows a rose that is drawn, which stays another kind.
    """
    import datasets

    from app.site.photos import data

    monkeypatch.setattr(photos, "CLASSES", 1)
    names, pictures = ["aster", "iris", "lily of the valley", "rose"], [p for p, _ in draw.photos(("rose",), 14, 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, labels, some in (("train", [0, 1, 1, 1, 3, 3, 3, 3, 2, 2], pictures), ("test", range(4), pictures[10:])):
        rows = datasets.Dataset.from_dict({"image": some[: len(labels)], "label": list(labels)}, features=features)
        rows.to_parquet(tmp_path / f"flowers/{split}-00000-of-00001.parquet")
    setting = photos.real(tmp_path / "home", 1, 3, 2, tmp_path / "flowers")
    found = [[photo.captions[0] for photo in data.scan(folder).photos] for folder in setting.folders]
    assert found == [["a photo of a rose"] * 3, ["a photo of a iris"] * 3]  # three at most
    assert setting.shares == [{"photo of a rose": 1.0}, {"photo of a iris": 1.0}]
    assert setting.held_out.keys() == {*draw.KNOWN, "photo of a rose", "photo of a iris"}
    [aside] = data.look(setting.held_out["photo of a iris"]).photos
    assert np.array_equal(np.asarray(aside.read()), np.asarray(pictures[11]))


# --- the table --------------------------------------------------------------------------------------------------------


def found(contender: str, new: list[list[float]], known: float = 0.1, seed: int = 42, right: int = 5) -> Cell:
    """new: by model, the loss on lilies (all that site 1 has), on poppies (all of site 2)."""
    loss = [{"lily": lily, "poppy": poppy} | dict.fromkeys(draw.KNOWN, known) for lily, poppy in new]
    right_ = [{"lily": right, "poppy": 0} for _ in new]
    shares = [{"lily": 1.0}, {"poppy": 1.0}]
    return Cell("disjoint", contender, seed, SIZES, shares, loss, right_, 2_000_000, 60.0, "here")


def test_own_and_others_are_by_whose_photos_they_are_and_whose_model_it_is():
    alone = found("alone", [[0.1, 0.4], [0.3, 0.2]])
    assert alone.own == pytest.approx((0.1 + 0.2) / 2) and alone.others == pytest.approx((0.4 + 0.3) / 2)
    assert alone.everybody == pytest.approx(0.25) and alone.judged == pytest.approx(10 / 40)
    one = found("fedavg", [[0.1, 0.4]])
    assert one.own == one.others == pytest.approx(0.25)


def test_a_row_has_the_loss_beside_the_bases_and_beside_fedavgs_of_the_same_seed():
    cells = [
        found("base", [[0.4, 0.4]]),
        found("fedavg", [[0.2, 0.2]], 0.11),
        found("fedavg", [[0.24, 0.24]], 0.12, seed=43),
        found("svd", [[0.18, 0.18]], 0.1),  # a tenth below fedavg's 0.2
        found("svd", [[0.264, 0.264]], 0.1, seed=43),  # a tenth above its 0.24
    ]
    rows = {
        row.split("|")[1].strip(): [part.strip() for part in row.split("|")[2:-1]]
        for row in methods.table(cells).splitlines()
    }
    assert rows["fedavg"][:4] == ["-45.0 ± 7.1", "-45.0 ± 7.1", "+15.0 ± 7.1", "–"]
    svd = ["-44.5 ± 14.8", "-44.5 ± 14.8", "+0.0 ± 0.0", "+0.0 ± 14.1", "25.0 ± 0.0", "2,000", "60", "2"]
    assert rows["svd"] == svd
    assert rows["base"][:4] == ["+0.0", "+0.0", "+0.0", "–"]


def test_it_asks_first_for_every_method_of_the_first_setting_and_goes_on_with_what_is_not_there(tmp_path, monkeypatch):
    file, page, made = tmp_path / "methods.json", tmp_path / "page.md", []
    file.write_text(json.dumps([asdict(found("base", [[0.4, 0.4]]))]))
    page.write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n")

    def cell(home, setting, name, seed, sizes, source):
        made.append((setting, name, seed))
        if len(made) == 3:
            raise KeyboardInterrupt
        return replace(found(name, [[0.2, 0.2]], seed=seed), setting=setting)

    monkeypatch.setattr(methods, "cell", cell)
    few = {"contenders": ["base", "fedavg", "own photos alone"], "settings": ["disjoint", "dirichlet", "real"]}
    sizes = {"rounds": 8, "steps": 15, "batch": 8, "photos": 120, "pictures": 10}
    given = argparse.Namespace(
        json=file,
        docs=page,
        quick=False,
        tiny=False,
        show=False,
        real=tmp_path / "nowhere",
        seeds=[42, 43],
        **few,
        **sizes,
    )
    with pytest.raises(KeyboardInterrupt):
        methods.main(given)
    assert made == [("disjoint", "fedavg", 42), ("disjoint", "own photos alone", 42), ("disjoint", "fedavg", 43)]
    assert [(c.contender, c.seed) for c in methods.read(file)] == [
        ("base", 42),
        ("fedavg", 42),
        ("own photos alone", 42),
    ]
    assert methods.main(given) == 0
    assert methods.main(argparse.Namespace(**vars(given) | {"show": True, "seeds": [44]})) == 0
    assert made[3:] == [
        ("disjoint", "fedavg", 43), ("disjoint", "own photos alone", 43),
        ("dirichlet", "base", 42), ("dirichlet", "fedavg", 42), ("dirichlet", "fedavg", 43),
    ]  # fmt: skip
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| fedavg |") == 2 and "arXiv:2403.12313" not in text  # no word of a method that has no row


@pytest.mark.slow
def test_the_command_trains_and_measures_on_the_demos_base_model(tmp_path):
    done = f"scripts/bench methods --tiny --contenders base alternate fedavg flora --json {tmp_path}/methods.json"
    rows = [row.split("|") for row in sh(done, ROOT).stdout.splitlines() if row.startswith("| ")]
    assert [row[1].strip() for row in rows[2:]] == ["base", "fedavg", "flora"]  # alternate takes two rounds
    assert float(rows[3][2]) < 0 and rows[4][5].strip() == "+0.0"  # after one step the two are nearly one net
