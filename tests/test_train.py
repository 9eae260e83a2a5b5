"""A site's share of a round: the steps it takes, against the same steps written out in plain PyTorch."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_post_hook

from app import model
from app.errors import ModelError, SiteError
from app.hub.guard import update_norm
from app.site import cache, diffusion, privacy, train
from app.site.photos import data
from tests.kit import tiny


def encoded(count: int = 6) -> cache.Encoded:
    latents, text = tiny.batch(count)
    return cache.Encoded.of(latents, text, torch.full((24, 16), 9.0), [f"photo {n}" for n in range(count)])


def trained(
    config=tiny.CONFIG, seed: int = 1, count: int = 6, start: model.Adapter | None = None
) -> tuple[model.Adapter, float]:
    unet = tiny.unet(config)
    model.apply_adapter(unet, start or tiny.fresh(config))
    loss = train.fit(unet, diffusion.Objective.of(tiny.base()), encoded(count), config, train.accelerator(config), seed)
    return model.adapter_of(unet), loss


def by_hand(
    config, seed: int, count: int = 6, start: model.Adapter | None = None
) -> tuple[model.Adapter, float, float]:
    """The same round without accelerate: AdamW, losses averaged over the passes of a step, gradients clipped to norm 1.

    Returns: the adapter, the mean loss, and the largest norm before clipping.
    """
    unet, photos, draw = tiny.unet(config), encoded(count), torch.Generator().manual_seed(seed)
    model.apply_adapter(unet, start or tiny.fresh(config))
    scheduler, batches = diffusion.Objective.of(tiny.base()), train._batches(count, config.batch_size, draw)
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(lora, lr=config.learning_rate, weight_decay=0.0), []
    norms = []
    for _ in range(config.local_steps):
        for _ in range(config.gradient_accumulation):
            pick = next(batches)
            text = photos.text_NTD[pick].clone()
            text[torch.rand(len(pick), 1, 1, generator=draw).flatten() < config.caption_dropout] = photos.blank_TD
            loss = diffusion.noise_loss(unet, scheduler, photos.latents_NChw[pick], {"text": text}, draw)
            (loss / config.gradient_accumulation).backward()
            losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(lora, 1.0).item())
        optimiser.step()
        optimiser.zero_grad()
    return model.adapter_of(unet), sum(losses) / len(losses), max(norms)


# --- the local steps
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation": 2, "batch_size": 2}, {"caption_dropout": 0.5, "lora_targets": "attention"}],
)
def test_a_round_is_the_plain_pytorch_loop_bit_for_bit(changes):
    config = tiny.config(**changes)
    adapter, loss = trained(config)
    expected, expected_loss, _ = by_hand(config, seed=1)
    assert tiny.equal(adapter, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_gradients_are_clipped_to_norm_1():
    steep = {"lora_A": 0.01, "lora_B": 5.0}  # a large B makes large gradients of A
    start = {key: value * steep[key.split(".")[-2]] for key, value in tiny.adapter(1).items()}
    expected, _, norm = by_hand(tiny.CONFIG, seed=1, start=start)
    assert norm > 1.5
    assert tiny.equal(trained(start=start)[0], expected)


@pytest.mark.parametrize("passes", [1, 3])
def test_the_optimiser_steps_local_steps_times_whatever_the_gradient_accumulation(passes):
    steps = []
    handle = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        trained(tiny.config(local_steps=4, gradient_accumulation=passes))
    finally:
        handle.remove()
    assert len(steps) == 4


def test_the_same_seed_gives_the_same_adapter_bit_for_bit():
    torch.manual_seed(1)
    first, _ = trained()
    torch.manual_seed(2)
    second, _ = trained()
    assert tiny.equal(first, second)


def test_another_seed_gives_another_adapter():
    assert not tiny.equal(trained(seed=1)[0], trained(seed=2)[0])


def test_a_seed_comes_from_run_site_and_round_and_from_nothing_else():
    assert privacy.PUBLIC.seed(42, "site-1", 1) == privacy.PUBLIC.seed(42, "site-1", 1)
    others = [privacy.PUBLIC.seed(*parts) for parts in itertools.product((42, 43), ("site-1", "site-2"), (1, 2))]
    assert len(set(others)) == 8 and all(0 <= seed < 2**63 for seed in others)


def test_another_round_takes_its_batches_in_another_order():
    def first(number):
        draw = torch.Generator().manual_seed(privacy.PUBLIC.seed(42, "site-1", number))
        return next(train._batches(100, 8, draw)).tolist()

    assert first(1) == first(1) != first(2)


@pytest.mark.parametrize(("count", "size"), [(6, 2), (7, 3), (5, 5), (3, 8), (1, 4)])
def test_every_photo_is_taken_once_before_any_is_taken_twice(count, size):
    batches = train._batches(count, size, torch.Generator().manual_seed(0))
    taken = torch.cat([next(batches) for _ in range(4 * count)]).tolist()
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    assert max(Counter(taken).values()) - min(Counter(taken).values()) <= 1


def test_training_changes_the_adapter_and_not_one_number_of_the_base():
    unet = tiny.unet()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    train.fit(unet, diffusion.Objective.of(tiny.base()), encoded(), tiny.CONFIG, train.accelerator(tiny.CONFIG), seed=1)
    changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


def test_enough_steps_learn_the_photos():
    config = tiny.config(local_steps=20, learning_rate=0.03, caption_dropout=0.0)
    unet, photos, scheduler = tiny.unet(config), encoded(4), diffusion.Objective.of(tiny.base())
    measure = lambda: diffusion.validation_loss(  # noqa: E731
        unet, scheduler, photos, torch.device("cpu"), timesteps=8, batch_size=32
    )
    before = measure()
    train.fit(unet, scheduler, photos, config, train.accelerator(config), seed=1)
    assert measure() < 0.9 * before


@pytest.mark.parametrize(("share", "blanks"), [(0.0, 0), (1.0, 12)])
def test_caption_dropout_puts_the_empty_captions_embedding_in_a_captions_place(share, blanks, monkeypatch):
    seen, loss = [], diffusion.noise_loss
    monkeypatch.setattr(
        diffusion,
        "noise_loss",
        lambda u, s, latents, given, g, **k: seen.append(given["text"]) or loss(u, s, latents, given, g, **k),
    )
    trained(tiny.config(caption_dropout=share))
    given = torch.cat(seen)
    assert int((given == 9.0).all(dim=(1, 2)).sum()) == blanks and len(given) == 12


def test_half_of_the_captions_are_dropped_at_a_dropout_of_a_half(monkeypatch):
    seen, loss = [], diffusion.noise_loss
    monkeypatch.setattr(
        diffusion,
        "noise_loss",
        lambda u, s, latents, given, g, **k: seen.append(given["text"]) or loss(u, s, latents, given, g, **k),
    )
    trained(tiny.config(caption_dropout=0.5, local_steps=4, batch_size=100))
    share = (torch.cat(seen) == 9.0).all(dim=(1, 2)).float().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 400**0.5)


# --- the site
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return tiny.site(tmp_path / "data", count=8)


def site(folder, config=tiny.CONFIG, fingerprint: str = "") -> train.Site:
    return train.Site(config, tiny.models(), folder, folder.parent / "cache", fingerprint)


def test_every_photo_is_either_trained_on_or_held_out(folder):
    here = site(folder)
    keys = [photo.key for photo in here.partition.photos]
    assert sorted(here.train.keys + here.held_out.keys) == sorted(keys) and len(here.held_out.keys) >= 1


def test_evaluation_repeats_and_does_not_change_what_training_does(folder):
    once, twice = site(folder), site(folder)
    assert once.evaluate() == twice.evaluate() == twice.evaluate()
    assert once.fit(1) == twice.fit(1)
    assert tiny.equal(model.adapter_of(once.net), model.adapter_of(twice.net))


def test_two_rounds_in_one_process_are_two_rounds_in_two(folder):
    # A SuperNode starts a process for each message; a script may keep the site. Neither may carry anything over.
    kept, fresh = site(folder), site(folder)
    kept.fit(1)
    model.apply_adapter(kept.net, tiny.adapter(5))
    model.apply_adapter(fresh.net, tiny.adapter(5))
    assert kept.fit(2) == fresh.fit(2)
    assert tiny.equal(model.adapter_of(kept.net), model.adapter_of(fresh.net))


def test_a_base_model_other_than_the_hubs_is_refused_before_any_photo_is_read(folder, monkeypatch):
    monkeypatch.setattr(cache, "encode", None)
    with pytest.raises(ModelError, match="MODEL-04") as caught:
        site(folder, fingerprint="0" * 64)
    assert str(folder.parent) not in str(caught.value) and "0" * 16 in caught.value.found


def test_the_hubs_own_base_model_is_taken(folder):
    assert site(folder, fingerprint=model.fingerprint(tiny.base())["base"]).evaluate() > 0


def test_an_empty_folder_is_refused_by_name_in_the_private_report_alone(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(SiteError, match="SITE-01") as caught:
        site(tmp_path / "data")
    assert str(tmp_path) in caught.value.report() and str(tmp_path) not in str(caught.value)


def test_an_undecodable_photo_does_not_stop_the_training(folder):
    path = folder / "0001.png"
    path.write_bytes(path.read_bytes()[:400])
    privacy.declare_public(folder, data.scan(folder).photos)
    here = site(folder)
    assert here.partition.counts == {"images": 7, "undecodable": 1}
    assert here.fit(1) > 0


def test_two_photos_are_enough(tmp_path):
    here = site(tiny.site(tmp_path / "data", count=2))
    assert (len(here.train.keys), len(here.held_out.keys)) == (1, 1)
    assert here.evaluate() > 0 and here.fit(1) > 0


def test_seconds_are_told_by_phase(folder):
    here = site(folder)
    here.evaluate(), here.fit(1)
    assert list(here.clock.seconds) == ["start", "encode", "load", "evaluate", "train"]
    assert all(seconds > 0 for seconds in here.clock.seconds.values())


def test_bf16_trains_a_float32_adapter_close_to_the_float32_one(folder):
    exact = site(folder)
    exact_loss = exact.fit(1)
    AcceleratorState._reset_state(True)  # accelerate allows one precision a process
    try:
        here = site(folder, tiny.config(precision="bf16"))
        loss = here.fit(1)
    finally:
        AcceleratorState._reset_state(True)
    assert loss == pytest.approx(exact_loss, rel=0.02) and loss != exact_loss
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in model.adapter_of(here.net).values())


def test_a_base_model_without_an_autoencoder_is_refused(folder, tmp_path):
    shutil.copytree(tiny.base(), tmp_path / "models" / "tiny", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ModelError, match="MODEL-03"):
        train.Site(tiny.CONFIG, tmp_path / "models", folder, tmp_path / "cache", "")


# --- out of memory, and FedProx
# -------------------------------------------------------------------------------------------


def starve(monkeypatch, above: int) -> list[int]:
    """A GPU that holds no more than `above` images a pass; the sizes that were tried."""
    tried, loss = [], diffusion.noise_loss

    def noise_loss(unet, scheduler, latents, *rest, **named):
        tried.append(len(latents))
        if len(latents) > above:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(unet, scheduler, latents, *rest, **named)

    monkeypatch.setattr(diffusion, "noise_loss", noise_loss)
    return tried


@pytest.fixture
def ready(tmp_path):
    return train.Site(tiny.CONFIG, tiny.models(), tiny.site(tmp_path / "data", 8), tmp_path / "cache", "")


def test_out_of_memory_is_tried_once_more_with_half_the_images_a_pass(ready, monkeypatch):
    tried = starve(monkeypatch, above=2)
    before = model.adapter_of(ready.net)
    ready.fit(7)
    assert tried == [4] + [2] * (2 * tiny.CONFIG.local_steps)
    assert not tiny.equal(model.adapter_of(ready.net), before)


def test_out_of_memory_twice_is_an_error_with_a_public_sentence(ready, monkeypatch):
    tried = starve(monkeypatch, above=1)
    with pytest.raises(SiteError, match="^SITE-13  The GPU has too little memory for this run.$"):
        ready.fit(7)
    assert tried == [4, 2]


def test_fedprox_pulls_towards_the_adapter_that_arrived():
    start = tiny.adapter(1)
    free, held = (
        update_norm(trained(tiny.config(proximal_mu=mu, local_steps=8), start=start)[0], start) for mu in (0.0, 100.0)
    )
    assert held < 0.7 * free


def test_fedprox_adds_mu_times_the_distance_to_the_gradient():
    # One step: the distance is 0, so nothing changes. Two steps: it is the plain loop with the term added by hand.
    one = tiny.config(local_steps=1)
    assert tiny.equal(trained(replace(one, proximal_mu=3.0))[0], trained(one)[0])
    config = tiny.config(local_steps=2, proximal_mu=3.0)
    unet, photos, draw = tiny.unet(config), encoded(), torch.Generator().manual_seed(1)
    model.apply_adapter(unet, tiny.fresh(config))
    scheduler, batches = diffusion.Objective.of(tiny.base()), train._batches(6, config.batch_size, draw)
    lora = [p for p in unet.parameters() if p.requires_grad]
    arrived = [p.detach().clone() for p in lora]
    optimiser = torch.optim.AdamW(lora, lr=config.learning_rate, weight_decay=0.0)
    for _ in range(2):
        pick = next(batches)
        text = photos.text_NTD[pick].clone()
        text[torch.rand(len(pick), 1, 1, generator=draw).flatten() < config.caption_dropout] = photos.blank_TD
        diffusion.noise_loss(unet, scheduler, photos.latents_NChw[pick], {"text": text}, draw).backward()
        for p, a in zip(lora, arrived, strict=True):
            p.grad += 3.0 * (p.detach() - a)
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    got = trained(config)[0]
    for key, value in model.adapter_of(unet).items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7)
