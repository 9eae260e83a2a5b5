"""Rounds whose hub sees no site's adapter: what leaves a site says nothing, the sum is right, and nobody is fooled."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.app import ConfigRecord, Error, Message, RecordDict

from app import masks, model, wire
from app.adapter import store
from app.config import RunConfig
from app.errors import AdapterError, BouquetError, ConfigError, HubError, SiteError
from app.hub import exchange, guard, sums
from app.hub.guard import Reply
from app.hub.strategy import Strategy
from app.site import secrecy
from app.site.limits import Limits
from benchmarks import check
from bouquet.hub import status
from bouquet.report.page import averaging, page
from bouquet.report.reading import read
from bouquet.site.preflight import Preflight, Settings
from tests.kit import tiny
from tests.kit.memory import Federation

NAMES = ("lily", "lotus", "poppy")
IMAGES = dict(zip(NAMES, (10, 30, 60), strict=True))
CONFIG = replace(tiny.CONFIG, min_sites=3, norm_bound=0.0, secrecy="masks", update_clip=4.0, round_retries=2)
RUN, APPLIED = "7", "a" * 64


def made(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, dict[str, str]]:
    """Every site's node config: a key in its folder, and the others' fingerprints."""
    pinned = {}
    for name in names:
        key = ec.generate_private_key(ec.SECP384R1())
        (folder / name).mkdir(parents=True, exist_ok=True)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        (folder / name / "site.key").write_bytes(private)
        said = masks.offer(masks.Key(name, 1, "1", 1, 0, X25519PrivateKey.generate().public_key()
                           .public_bytes(Encoding.Raw, PublicFormat.Raw).hex()), key)  # fmt: skip
        pinned[name] = masks.read(said).fingerprint
    peers = " ".join(f"{name}={digest}" for name, digest in pinned.items())
    return {name: {"peers": peers, "key-path": str(folder / name / "site.key")} for name in names}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return made(tmp_path_factory.mktemp("keys"), (*NAMES, "rose"))


@pytest.fixture
def sites(nodes, tmp_path: Path) -> dict[str, secrecy.Own]:
    return {name: secrecy.Own.read(nodes[name], name, tmp_path / name) for name in NAMES}


def offers(sites, number: int = 1, attempt: int = 0) -> dict[str, str]:
    return {name: own.offer(CONFIG, IMAGES.get(name, 1), RUN, number, attempt) for name, own in sites.items()}


def agree(own: secrecy.Own, texts, number: int = 1, attempt: int = 0, applied: str = APPLIED) -> secrecy.Pact:
    return own.agree(CONFIG, texts, RUN, number, attempt, applied)


def adapter(*numbers: float) -> model.Adapter:
    return {"b": torch.tensor(numbers[2:]), "a": torch.tensor([numbers[:2]])}


def refused(why: str, call) -> None:
    with pytest.raises(SiteError) as caught:
        call()
    assert caught.value.code == "TRUST-14" and why in str(caught.value), caught.value.report()


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_the_sum_is_the_mean_by_images_of_the_clipped_updates_worked_out_by_hand(sites):
    before = adapter(1.0, 1.0, 1.0)
    after = {  # updates (1, 2, 2), (0, 0, -2) and (0, 8, 0); the last is 8 long and clipped to 4
        "lily": adapter(2.0, 3.0, 3.0), "lotus": adapter(1.0, 1.0, -1.0), "poppy": adapter(1.0, 9.0, 1.0),
    }  # fmt: skip
    said = offers(sites)
    hidden = {name: agree(own, said.values()).hide(before, after[name]) for name, own in sites.items()}
    replies = [Reply(name, hidden[name], IMAGES[name], {}) for name in NAMES]
    new = sums.total(replies, before, CONFIG.update_clip)
    # 0.1 (1, 2, 2) + 0.3 (0, 0, -2) + 0.6 (0, 4, 0)
    assert torch.allclose(new["a"], torch.tensor([[1.1, 3.6]]), rtol=0, atol=3e-7)
    assert torch.allclose(new["b"], torch.tensor([0.6]), rtol=0, atol=3e-7)


def test_whole_steps_survive_the_sum_exactly_and_a_sum_as_long_as_the_clip_does_not_wrap():
    clip, step = 2.0, 2.0 / 2**30
    updates = [np.array([0.0, 3 * step, -5 * step]), np.array([0.0, -4 * step, 2 * step]), np.array([0.0, 0.0, 0.0])]
    assert masks.mean([masks.fixed(each, clip) for each in updates], clip).tolist() == [0.0, -step, -3 * step]
    whole = [masks.fixed(share * np.array([-clip, clip]), clip) for share in (0.5, 0.25, 0.25)]
    assert masks.mean(whole, clip).tolist() == [-clip, clip]


def test_an_update_takes_as_many_bytes_as_in_float32_and_its_mean_is_off_by_half_a_step_a_site_at_most(sites):
    numbers = torch.Generator().manual_seed(0)
    before = {"w": torch.randn(1000, generator=numbers)}
    after = {name: {"w": before["w"] + 0.05 * torch.randn(1000, generator=numbers)} for name in NAMES}
    said = offers(sites)
    hidden = {name: agree(own, said.values()).hide(before, after[name]) for name, own in sites.items()}
    assert {value.nbytes for sent in hidden.values() for value in sent.values()} == {4 * 1000}
    mean = masks.mean([masks.unpacked(sent) for sent in hidden.values()], CONFIG.update_clip)
    true = sum(IMAGES[name] / 100 * (masks.flat(after[name]) - masks.flat(before)) for name in NAMES)
    assert np.abs(mean - true).max() <= 1.5 * CONFIG.update_clip / 2**30


def test_the_site_and_the_hub_weigh_alike_and_neither_lets_one_site_be_most_of_the_sum():
    for counts in ((10, 30, 60), (1000, 8, 8), (5, 5, 5), (1, 1, 100)):
        images = dict(zip(NAMES, counts, strict=True))
        weighed = guard.weigh([Reply(name, None, own, {}) for name, own in images.items()], {}, 0.8)
        total = sum(reply.images for reply in weighed)
        assert masks.shares(images, 0.8) == {reply.site: reply.images / total for reply in weighed}
        assert max(masks.shares(images, 0.8).values()) <= 0.8
    assert masks.shares({"a": 1000, "b": 8, "c": 8}, 1.0)["a"] == 1000 / 1016


# --- what the hub sees ------------------------------------------------------------------------------------------------


def test_one_sites_numbers_are_uniform_and_have_nothing_to_do_with_its_update(sites):
    count = 200_000
    update = np.random.default_rng(1).standard_normal(count) * 0.005
    before, after = {"w": torch.zeros(count)}, {"w": torch.from_numpy(update).float()}
    pact = agree(sites["lily"], offers(sites).values())
    seen = masks.unpacked(pact.hide(before, after))
    as_numbers = seen.view(np.int32).astype(np.float64)
    noise = 4 / np.sqrt(count)  # four standard errors
    assert abs(np.corrcoef(as_numbers, update)[0, 1]) < noise
    plain = masks.fixed(masks.clipped(update, CONFIG.update_clip), CONFIG.update_clip)
    assert np.corrcoef(plain.view(np.int32).astype(np.float64), update)[0, 1] > 0.999  # what it would be without masks
    for byte in range(4):  # chi-squared over 256 values: mean 255, standard deviation 22.6
        found = np.bincount(seen.view(np.uint8)[byte::4], minlength=256)
        assert abs(((found - count / 256) ** 2 / (count / 256)).sum() - 255) < 5 * 22.6


def test_two_of_three_sites_numbers_together_still_say_nothing(sites):
    """The third mask is missing: the sum of two is as random as one."""
    count = 50_000
    update = np.random.default_rng(2).standard_normal(count) * 0.01
    before, after = {"w": torch.zeros(count)}, {"w": torch.from_numpy(update).float()}
    said = offers(sites)
    hidden = [masks.unpacked(agree(sites[name], said.values()).hide(before, after)) for name in NAMES]
    two = (hidden[0] + hidden[1]).view(np.int32).astype(np.float64)
    assert abs(np.corrcoef(two, update)[0, 1]) < 4 / np.sqrt(count)
    assert np.corrcoef(sum(hidden).view(np.int32), update)[0, 1] > 0.999


def test_no_two_tries_rounds_or_pairs_have_a_stream_in_common(sites):
    """Nothing is learned from the difference of two messages that hide the same update."""
    before = after = {"w": torch.zeros(1000)}
    seen = []
    for number, attempt in ((1, 0), (1, 1), (2, 0)):
        said = offers(sites, number, attempt)
        seen += [
            masks.unpacked(agree(own, said.values(), number, attempt).hide(before, after)) for own in sites.values()
        ]
    zero = masks.fixed(np.zeros(1), 1.0)[0]
    for n, one in enumerate(seen):
        assert (one == zero).sum() < 5
        assert all((one == other).sum() < 5 and (one == -other).sum() < 5 for other in seen[:n])


# --- what a site refuses ----------------------------------------------------------------------------------------------


def test_a_hub_that_hands_out_a_key_of_its_own_is_found_out(sites):
    said = offers(sites)
    own = json.loads(said["lotus"])
    key = json.loads(own["body"]) | {"key": X25519PrivateKey.generate().public_key()
                                     .public_bytes(Encoding.Raw, PublicFormat.Raw).hex()}  # fmt: skip
    hubs = masks.offer(masks.Key(**key), ec.generate_private_key(ec.SECP384R1()))  # signed, by who is not lotus
    refused("was not pinned here", lambda: agree(sites["lily"], [said["lily"], hubs, said["poppy"]]))
    forged = json.dumps(own | {"body": json.dumps(key)})  # with the signature of the true one
    refused("not signed as it should be", lambda: agree(sites["poppy"], [said["lily"], forged, said["poppy"]]))


def sites_of(nodes) -> str:
    return nodes["lily"]["peers"]


def test_a_stranger_among_the_sites_is_refused(sites, nodes, tmp_path):
    stranger = made(tmp_path / "strangers", ("violet",))["violet"] | {"peers": sites_of(nodes)}
    said = [*offers(sites).values(), secrecy.Own.read(stranger, "violet", tmp_path / "v").offer(CONFIG, 5, RUN, 1, 0)]
    refused("was not pinned here", lambda: agree(sites["lily"], said))


def test_a_roster_of_two_is_refused_and_so_is_one_site_twice(sites):
    said = offers(sites)
    refused("fewer than 3", lambda: agree(sites["lily"], [said["lily"], said["lotus"]]))
    refused("fewer than 3", lambda: agree(sites["lotus"], [said["lily"], said["lotus"], said["lotus"]]))
    refused("fewer than 3", lambda: agree(sites["poppy"], []))


def test_a_site_whose_limits_ask_for_all_sites_is_in_no_smaller_sum_that_could_be_subtracted(sites):
    four = replace(CONFIG, min_sites=4)
    with pytest.raises(SiteError, match="TRUST-03"):
        Limits.read("min-min-sites=4").check(CONFIG)
    Limits.read("min-min-sites=4").check(four)
    said = offers(sites)
    refused("fewer than 4", lambda: sites["lily"].agree(four, said.values(), RUN, 1, 0, APPLIED))


def test_a_site_hides_nothing_where_its_own_key_was_left_out_or_exchanged(sites, nodes, tmp_path):
    said = offers(sites)
    rose = secrecy.Own.read(nodes["rose"], "rose", tmp_path / "rose").offer(CONFIG, 5, RUN, 1, 0)
    refused("own key is not among them", lambda: agree(sites["lily"], [rose, said["lotus"], said["poppy"]]))


def test_a_key_of_an_earlier_try_or_another_run_is_refused(sites):
    first, second = offers(sites), offers(sites, attempt=1)
    mixed = [second["lily"], second["lotus"], first["poppy"]]
    refused("for another try", lambda: agree(sites["lily"], mixed, attempt=1))


def test_a_try_is_answered_once_even_by_a_new_process_and_its_key_is_gone(sites, nodes, tmp_path):
    said = offers(sites)
    refused("asked for before", lambda: sites["lily"].offer(CONFIG, 10, RUN, 1, 0))
    agree(sites["lily"], said.values())
    again = secrecy.Own.read(nodes["lily"], "lily", tmp_path / "lily")
    refused("has used it", lambda: agree(again, said.values()))
    refused("asked for before", lambda: again.offer(CONFIG, 10, RUN, 1, 0))
    refused("has used it", lambda: agree(again, said.values(), attempt=1))
    assert [(file.name, file.read_text()) for file in (tmp_path / "lily/masks").iterdir()] == [("7-1-0.used", "")]


def test_a_site_answers_no_more_tries_than_the_run_and_so_its_own_limits_allow(sites):
    refused("no such try", lambda: sites["lily"].offer(CONFIG, 10, RUN, 1, 3))
    with pytest.raises(SiteError, match="TRUST-03"):
        Limits.read("max-round-retries=0").check(CONFIG)


@pytest.mark.parametrize("what", ["adapter", "clip"])
def test_sites_that_were_told_different_things_make_no_sum(sites, what):
    """Their masks do not cancel, and the hub sees that from the length."""
    said, before = offers(sites), {"w": torch.zeros(1000)}
    other = {"adapter": (CONFIG, "b" * 64), "clip": (replace(CONFIG, update_clip=3.0), APPLIED)}[what]
    pacts = [agree(sites[name], said.values()) for name in NAMES[:2]]
    pacts.append(sites["poppy"].agree(other[0], said.values(), RUN, 1, 0, other[1]))
    replies = [Reply(pact.site, pact.hide(before, before), 1, {}) for pact in pacts]
    with pytest.raises(HubError) as caught:
        sums.total(replies, before, CONFIG.update_clip)
    assert caught.value.code == "HUB-11"


def test_a_site_sends_no_update_that_is_not_finite(sites):
    pact = agree(sites["lily"], offers(sites).values())
    with pytest.raises(AdapterError, match="ADAPTER-02"):
        pact.hide(adapter(0, 0, 0), adapter(0, float("nan"), 0))


def test_a_site_that_pins_nobody_or_has_no_key_takes_no_part(nodes, tmp_path):
    own = nodes["lily"]
    refused("pinned no two peers", lambda: secrecy.Own.read(own | {"peers": ""}, "lily", tmp_path))
    refused("pinned no two peers", lambda: secrecy.Own.read(own | {"peers": own["peers"].split()[1]}, "lily", tmp_path))
    for peers in ("rose=SHA256:x", "rose", f"=SHA256:{'a' * 43}", "$SITE_PEERS"):
        refused("peers cannot be read", partial(secrecy.Own.read, own | {"peers": peers}, "lily", tmp_path))
    for path in (str(tmp_path / "none"), __file__):
        at = partial(secrecy.Own.read, own | {"key-path": path}, "lily", tmp_path)
        refused("own key cannot be read", at)


def test_a_key_that_was_not_used_is_gone_with_the_next_try(sites, tmp_path):
    first = offers(sites)
    offers(sites, attempt=1)
    refused("has used it", lambda: agree(sites["lily"], first.values()))
    assert (tmp_path / "lily/masks/7-1-0.used").read_text() == ""


def test_the_sites_own_check_names_its_peers_and_what_is_wrong_with_them(nodes):
    env = {"SITE_NAME": "lily", "SITE_KEY": nodes["lily"]["key-path"], "SITE_PEERS": nodes["lily"]["peers"]}
    line = Preflight(Settings.read(env)).line("name")
    assert (line.state, line.text) == ("pass", "lily; hides its updates with lotus, poppy, rose")
    line = Preflight(Settings.read(env | {"SITE_PEERS": "lotus"})).line("name")
    assert line.state == "fail" and line.text.startswith("TRUST-14")
    asked = {"SITE_PEERS": "", "RUN_CONFIG": 'secrecy="masks" min-sites=3 norm-bound=0.0'}
    assert Preflight(Settings.read(env | asked)).line("name").state == "fail"
    assert Preflight(Settings.read(env | {"SITE_PEERS": ""})).line("name").text == "lily"


def test_a_site_may_insist_on_secrecy():
    Limits.read("secrecy=masks").check(CONFIG)
    for limits in (Limits.read("secrecy=masks"), Limits.read("secrecy=masks").private()):
        with pytest.raises(SiteError) as caught:
            limits.check(tiny.CONFIG)
        assert str(caught.value).startswith("TRUST-03  The run's 'secrecy'")
    with pytest.raises(SiteError, match="TRUST-04"):
        Limits.read("secrecy=mask")


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 5000, "x" * 5000, '{"body": "{}", "identity": "", "signature": ""}', "é"]
)
def test_what_is_no_offer_is_refused_as_such(text):
    with pytest.raises(ValueError, match="not signed as it should be"):
        masks.read(text)


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_whose_settings_need_single_adapters_is_refused():
    good = {"secrecy": "masks", "min-sites": 3, "norm-bound": 0.0}
    assert RunConfig.read(good).update_clip == 16
    for key, value in {
        "min-sites": 2, "norm-bound": 5.0, "wire-precision": "fp16", "strategy": "median",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            RunConfig.read(good | {key: value})
        assert caught.value.code == "CONFIG-02" and key in str(caught.value) and "masks" in caught.value.fix
    for strategy in ("trimmed-mean", "krum"):
        with pytest.raises(ConfigError, match="CONFIG-02"):
            RunConfig.read(good | {"strategy": strategy})
    for strategy in ("fedavg", "fedavgm", "fedadam"):
        RunConfig.read(good | {"strategy": strategy})


COUNTS = {"lily": 8, "lotus": 12, "poppy": 16, "rose": 8}


def federation(root: Path, sites: int = 3, **run_config) -> Federation:
    """Sites that know each other, and a hub that is to see none of their adapters."""
    names = dict(list(COUNTS.items())[:sites])
    asked = {"secrecy": "masks", "min_sites": 3, "norm_bound": 0.0, "sample_prompts": "", **run_config}
    made_of = Federation(root, counts=names, **asked)
    for name, own in made(root / "keys", tuple(names)).items():
        made_of.own[name] |= own
    return made_of


def far(one: model.Adapter, other: model.Adapter) -> float:
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)


def final(folder: Path) -> model.Adapter:
    return store.read_adapter(folder / "final")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A whole run of two rounds, with what the sites sent."""
    ran = federation(tmp_path_factory.mktemp("hidden"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BOUQUET_KEEP_SENT", "1")
        ran.go(patch)
    return ran


@pytest.mark.slow
def test_of_what_averaging_lost_it_is_said_that_nobody_knows(hidden):
    run = read(hidden.adapters / "7")
    assert [entry.aggregation_error for entry in run.rounds] == [None, None]
    assert "averaging not known" in status.words(status.tell(run, "finished", "", {}))
    assert averaging(run) == {"last": None, "chart": None} and "products: not known" in page(run)


@pytest.mark.slow
def test_a_run_with_masks_ends_with_the_adapter_of_a_run_without(hidden, tmp_path, monkeypatch):
    plain = federation(tmp_path, secrecy="none")
    one, other = hidden.adapters / "7", plain.go(monkeypatch)
    step = 16 / 2**30  # half of one a site, and float32's own rounding of numbers up to 1
    assert far(store.read_adapter(one / "round-0001"), store.read_adapter(other / "round-0001")) < 1.5 * step + 2e-7
    assert far(store.read_adapter(one / "final"), store.read_adapter(other / "final")) < 1e-3  # a round of Adam later
    told = hidden.history()
    assert [sorted(entry["sites"]) for entry in told["rounds"]] == [["lily", "lotus", "poppy"]] * 2
    weights = [{s: part["weight"] for s, part in r["sites"].items()} for r in told["rounds"]]
    assert weights == [{s: part["weight"] for s, part in r["sites"].items()} for r in plain.history()["rounds"]]
    assert all("update-norm" not in part for entry in told["rounds"] for part in entry["sites"].values())
    sent = [key for _, _, m in hidden.grid.came if "arrays" in m.content for key in wire_keys(m)]
    assert sent == [masks.NAME] * 6  # and nothing else with numbers of the adapter


def wire_keys(message: Message) -> list[str]:
    return list(wire.unpack(message.content["arrays"]))


def test_the_checker_finds_the_sum_in_what_the_sites_hid_and_says_where_it_is_not(hidden, tmp_path):
    root = Path(shutil.copytree(hidden.root, tmp_path / "root", symlinks=True))
    caches = {name: root / "cache" / name for name in NAMES}
    evidence = check.Evidence(root / "adapters/7", caches, tiny.models())
    assert check.check(evidence) == []
    told = evidence.history()
    told["config"]["update_clip"] *= 2  # as if the hub had moved by half of what was sent
    (evidence.run / "history.json").write_text(json.dumps(told))
    assert any("round 2 did not move by the sum" in problem for problem in check.check(evidence))


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam"])
def test_every_strategy_moves_by_the_sum_as_it_does_by_the_sites_own_adapters(sites, name):
    config = replace(CONFIG, strategy=name, server_learning_rate=0.01)
    before = adapter(1.0, 1.0, 1.0)
    after = {"lily": adapter(2.0, 3.0, 3.0), "lotus": adapter(1.0, 1.0, -1.0), "poppy": adapter(1.0, 2.0, 1.0)}
    plain = [Reply(site, after[site], IMAGES[site], {}) for site in NAMES]
    said = offers(sites)
    hidden = [replace(r, adapter=agree(sites[r.site], said.values()).hide(before, r.trained)) for r in plain]
    summed = [Reply("sum", sums.total(hidden, before, config.update_clip), 100, {})]
    own, by_sum = Strategy(config), Strategy(config)
    assert far(own.aggregate(1, plain, before), by_sum.aggregate(1, summed, before)) < 1e-6
    states = own.state(), by_sum.state()
    assert states[0].keys() == states[1].keys() and (name == "fedavg") == (not states[0])
    assert not states[0] or far(*states) < 1e-6


def drop(site: str, after_offers: bool = True):
    """A site that is lost between its key and its update, in the first try."""
    lost = []

    def tamper(who: str, number: str, reply: Message) -> Message | None:
        if who == site and number == "1" and ("arrays" in reply.content or not after_offers) and len(lost) < 1:
            lost.append(number)
            return Message(Error(code=100, reason="SITE-99  gone"), reply_to=reply)
        return reply

    return tamper


@pytest.mark.slow
def test_a_site_that_drops_out_is_left_out_of_the_next_try_whose_mean_is_the_others(tmp_path, monkeypatch):
    how = {"rounds": 1, "round_retries": 1, "local_steps": 1, "validation_timesteps": 1}
    hidden = federation(tmp_path / "hidden", sites=4, **how)
    hidden.grid.tamper = drop("lotus")
    plain = federation(tmp_path / "plain", sites=4, secrecy="none", **how)
    plain.grid.tamper = drop("lotus")
    one, other = hidden.go(monkeypatch), plain.go(monkeypatch)
    (entry,) = hidden.history()["rounds"]
    assert sorted(entry["sites"]) == ["lily", "poppy", "rose"] and entry["refused"][0]["site"] == "lotus"
    assert far(final(one), final(other)) < 1e-5


def test_a_site_that_offers_no_key_costs_no_try(tmp_path, monkeypatch):
    hidden = federation(tmp_path, sites=4, rounds=1, local_steps=1, validation_timesteps=1)
    hidden.grid.tamper = drop("lotus", after_offers=False)
    hidden.go(monkeypatch)
    assert sorted(hidden.history()["rounds"][0]["sites"]) == ["lily", "poppy", "rose"]


def test_a_sum_that_is_none_is_tried_again_and_ends_the_run_by_its_name(tmp_path, monkeypatch):
    hidden = federation(tmp_path, rounds=1, round_retries=0)

    def tamper(who: str, number: str, reply: Message) -> Message:
        if who == "lotus" and "arrays" in reply.content:
            numbers = wire.unpack(reply.content["arrays"])[masks.NAME]
            reply.content["arrays"] = wire.pack({masks.NAME: numbers.roll(1)})
        return reply

    hidden.grid.tamper = tamper
    error = hidden.fails(monkeypatch, "HUB-02")
    assert "the sum: HUB-11" in str(error)


def test_a_site_that_counts_more_images_than_it_was_admitted_with_is_left_out(tmp_path, monkeypatch):
    hidden = federation(tmp_path, rounds=1)
    (admitted := tmp_path / "admitted").mkdir()
    for name in NAMES:
        (admitted / f"{name}.pub").write_text("")
    (admitted / "poppy.json").write_text('{"images": 3}')
    monkeypatch.setenv("BOUQUET_ADMITTED", str(admitted))
    assert "more images than it was admitted with" in str(hidden.fails(monkeypatch, "HUB-02"))


def test_a_hub_that_asks_for_plain_adapters_in_a_run_with_masks_gets_none(tmp_path, monkeypatch):
    hidden = federation(tmp_path, rounds=1)
    monkeypatch.setattr(sums.Sums, "attempt", exchange.Exchange.attempt)
    assert "TRUST-14" in str(hidden.fails(monkeypatch, "HUB-02"))


def test_an_offer_for_something_else_is_not_taken(sites, monkeypatch):
    tiny.be_the_hub(monkeypatch, 7)
    said = offers(sites)["lily"]
    accept = partial(guard.accept_offer, message_with(said), admitted={})
    assert accept("lily", asked=(RUN, 1, 0)).images == 10
    for site, asked in (("rose", (RUN, 1, 0)), ("lily", (RUN, 2, 0)), ("lily", ("8", 1, 0))):
        with pytest.raises(BouquetError, match="HUB-05"):
            accept(site, asked=asked)
    with pytest.raises(BouquetError, match="HUB-05"):
        guard.accept_offer(message_with("nonsense"), "lily", (RUN, 1, 0), {})


def message_with(said: str) -> Message:
    return Message(RecordDict({"info": ConfigRecord({"offer": said})}), dst_node_id=1, message_type="query")
