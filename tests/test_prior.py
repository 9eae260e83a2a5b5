"""Prior preservation: a site's class images are learned beside its photos, and count as none of them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from app import model
from app.adapter import sample
from app.config import RunConfig
from app.errors import ConfigError, SiteError
from app.site import cache, diffusion, privacy, train
from app.site.photos import data, prior
from bouquet import cli
from bouquet.site import preflight
from tests.kit import tiny

CPU = torch.device("cpu")
ASKED = tiny.config(prior_loss_weight=0.5)
NOISE = replace(ASKED, prior_target="noise")


def encoded(count: int, seed: int) -> cache.Encoded:
    latents, text = tiny.batch(count, seed)
    return cache.Encoded.of(latents, text, torch.full((24, 16), 9.0), [f"{seed} {n}" for n in range(count)])


def fitted(config, others: cache.Encoded | None) -> tuple[model.Adapter, float]:
    unet = tiny.unet(config)
    objective = diffusion.Objective.of(tiny.base())
    loss = train.fit(unet, objective, encoded(6, 0), config, train.accelerator(config), 1, prior=others)
    return model.adapter_of(unet), loss


def dreambooth(config, others: cache.Encoded) -> tuple[model.Adapter, float]:
    """diffusers' loop: photos and class images in one forward pass, whose halves have their own mean squared errors. Of
    class images the target is their noise, or what a net without an adapter predicts.
    """
    unet, photos, base = tiny.unet(config), encoded(6, 0), model.load_net(tiny.base(), torch.float32)
    schedule = diffusion.Objective.of(tiny.base()).schedule
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(lora, lr=config.learning_rate, weight_decay=0.0), []
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    batches = [
        train._batches(len(some.keys), config.batch_size, draw)
        for some, draw in zip((photos, others), draws, strict=True)
    ]
    for _ in range(config.local_steps):
        for _ in range(config.gradient_accumulation):
            latents, texts, noises, levels = [], [], [], []
            for some, draw, batch in zip((photos, others), draws, batches, strict=True):
                pick = next(batch)
                text = some.text_NTD[pick].clone()
                if some is photos:
                    text[torch.rand(len(pick), generator=draw) < config.caption_dropout] = some.blank_TD
                latents.append(some.latents_NChw[pick])
                texts.append(text)
                noises.append(torch.randn(latents[-1].shape, generator=draw))
                levels.append(schedule.draw(len(pick), draw))
            z, noise, t = torch.cat(latents), torch.cat(noises), torch.cat(levels)
            asked = (schedule.noisy(z, noise, t), t, torch.cat(texts))
            (own, class_), (own_target, class_target) = (
                some.chunk(2) for some in (unet(*asked).sample, schedule.target(z, noise, t))
            )
            if config.prior_target == "base":
                with torch.no_grad():
                    _, class_target = base(*asked).sample.chunk(2)
            loss = F.mse_loss(own, own_target) + config.prior_loss_weight * F.mse_loss(class_, class_target)
            (loss / config.gradient_accumulation).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return model.adapter_of(unet), sum(losses) / len(losses)


@pytest.mark.parametrize("target", ["noise", "base"])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2, "batch_size": 2, "prior_loss_weight": 1.5}])
def test_a_round_with_class_images_is_dreambooths_loop(changes, target):
    config = replace(ASKED, prior_target=target, **changes)
    (adapter, loss), (expected, expected_loss) = (one(config, encoded(5, 3)) for one in (fitted, dreambooth))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for key, value in adapter.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
    assert not tiny.equal(adapter, fitted(config, None)[0])


def test_class_images_have_no_min_snr_weights_and_the_photos_keep_theirs():
    """As diffusers has it: with a weight of 1 the loss grows by what the class images' own plain loss is."""
    config = replace(NOISE, local_steps=1, min_snr_gamma=5.0, prior_loss_weight=1.0, caption_dropout=0.0)
    others, draw = encoded(4, 3), torch.Generator().manual_seed(2)
    pick = next(train._batches(4, 4, draw))
    rows, given = others.batch(pick)
    plain = diffusion.noise_loss(tiny.unet(), diffusion.Objective.of(tiny.base()), rows, given, draw).item()
    assert fitted(config, others)[1] - fitted(config, None)[1] == pytest.approx(plain, rel=1e-4)


# --- what the base model makes of them --------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_has_nothing_to_learn_of_them():
    """Its B is 0: in the first step the net is the base model, whose own prediction has no loss and no gradient."""
    config = replace(ASKED, local_steps=1, prior_loss_weight=100.0)
    (with_, loss), (without, plain) = fitted(config, encoded(5, 3)), fitted(config, None)
    assert loss == plain and tiny.equal(with_, without)


@pytest.mark.slow
def test_the_more_they_weigh_the_nearer_the_net_stays_to_the_base_model():
    """On class images, after steps that learn photos: the mean squared difference from the base's prediction."""
    others, objective = encoded(5, 3), diffusion.Objective.of(tiny.base())
    rows, given = others.batch(torch.arange(5))

    def away(weight: float) -> float:
        unet, config = tiny.unet(), replace(ASKED, local_steps=12, prior_loss_weight=weight)
        train.fit(unet, objective, encoded(6, 0), config, train.accelerator(config), 1, prior=others)
        draw = torch.Generator().manual_seed(5)
        return diffusion.noise_loss(unet, objective, rows, given, draw, kept=True).item()

    assert 0 < away(100.0) < 0.5 * away(1.0) < 0.5 * away(0.0)


def test_what_the_base_model_predicts_is_asked_of_the_net_itself_and_only_what_is_trained_stays_trained():
    """Where a round trains B alone (strategy=alternate), A is where it was, to the bit."""
    config = replace(ASKED, strategy="alternate")
    before, (after, _) = model.adapter_of(tiny.unet(config)), fitted(config, encoded(5, 3))
    moved = {key.split(".lora_")[1][0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == {"B"}
    unet, base = tiny.unet(), model.load_net(tiny.base(), torch.float32)
    model.apply_adapter(unet, tiny.adapter(3))
    rows, given = encoded(4, 3).batch(torch.arange(4))
    draw = torch.Generator().manual_seed(5)
    noise, t = torch.randn(rows.shape, generator=draw), torch.tensor([1, 300, 600, 900])
    objective = diffusion.Objective.of(tiny.base())
    noisy = objective.schedule.noisy(rows, noise, t)
    expected = (unet(noisy, t, given["text"]).sample - base(noisy, t, given["text"]).sample).square().mean((1, 2, 3))
    found = diffusion.losses(unet, objective, rows, given, noise, t, kept=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_target_that_no_class_image_has_is_refused():
    with pytest.raises(ConfigError, match="CONFIG-02") as caught:
        RunConfig.read({"prior-target": "noise"})
    assert "prior-loss-weight" in caught.value.report()
    assert RunConfig.read({"prior-target": "noise", "prior-loss-weight": 1.0}).prior_target == "noise"


# --- a site's own -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eight photos, and three class images; all public."""
    folder = tiny.site(tmp_path / "data", count=8)
    inside = tiny.site(folder / "class-images", count=3, seed=7, public=False)
    (inside / "metadata.jsonl").unlink()
    (inside / "caption.txt").write_text("a photo of a flower\n")
    everything = (*data.scan(folder).photos, *prior.scan(folder).photos)
    privacy.declare_public(folder, everything)
    return folder


def site(folder: Path, config=ASKED) -> train.Site:
    return train.Site(config, tiny.models(), folder, folder.parent / "cache", "")


def test_class_images_are_learned_and_count_as_none_of_the_sites_photos(folder, capsys):
    here, without = site(folder), site(folder, tiny.CONFIG)
    assert here.prior is not None and len(here.prior.keys) == 3 and without.prior is None
    assert "class images: " in capsys.readouterr().out
    assert here.partition == without.partition and here.partition.counts == {"images": 8}
    assert (here.train.keys, here.held_out.keys) == (without.train.keys, without.held_out.keys)
    assert not {*here.train.keys, *here.held_out.keys} & set(here.prior.keys)
    assert here.evaluate() == without.evaluate() and here.fit(1) > without.fit(1)
    assert not tiny.equal(model.adapter_of(here.net), model.adapter_of(without.net))


def test_class_images_keep_their_captions_as_they_are_and_a_cache_of_their_own(folder, monkeypatch):
    here = site(folder, replace(ASKED, trigger_word="zwx"))
    assert here.prior is not None
    parts = {part: model.load(tiny.base(), part) for part in here.objective.family.words}
    with torch.no_grad():
        (expected,) = here.objective.family.text(parts, ["a photo of a flower"], 24)
    torch.testing.assert_close(here.prior.text_NTD[0], expected["text"], rtol=1e-3, atol=1e-3)
    for name in ("_encode_photos", "_encode_captions"):
        monkeypatch.setattr(cache, name, lambda *_: pytest.fail("encoded again"))
    assert site(folder, replace(ASKED, trigger_word="zwx")).prior.keys == here.prior.keys


def test_a_changed_class_image_is_encoded_again_with_the_next_message(folder):
    here = site(folder)
    before = here.prior.keys
    (folder / "class-images" / "0001.png").unlink()
    here.get_ready("")
    assert len(here.prior.keys) == 2 and set(here.prior.keys) < set(before)


def test_a_class_image_that_nobody_has_declared_public_makes_the_site_private(folder):
    privacy.declare_public(folder, data.scan(folder).photos)
    assert not site(folder, tiny.CONFIG).privacy.private
    with pytest.raises(SiteError, match=r"SITE-14|SITE-02|TRUST-03"):  # a private site's floors
        site(folder)


def test_a_private_site_has_no_fewer_class_images_than_the_photos_that_a_round_is_about(tmp_path):
    """One would be all that a loss of weight 100 tells of; eight are the floor of photos."""
    folder = tiny.site(tmp_path / "data", count=40, public=False)
    run, inside = replace(ASKED, local_steps=4), tiny.site(folder / "class-images", count=8, seed=7, public=False)
    how = {"secret": privacy.Secret.MADE}
    assert len(train.Site(run, tiny.models(), folder, tmp_path / "cache", "", **how).prior.keys) == 8
    (inside / "0001.png").unlink()
    with pytest.raises(SiteError, match="SITE-02") as refused:
        train.Site(run, tiny.models(), folder, tmp_path / "cache", "", **how)
    assert "7 class images; this site's floor is 8" in refused.value.found


@pytest.mark.parametrize("how", ["none", "empty", "damaged", "a link out"])
def test_a_run_that_asks_for_class_images_where_there_are_none_is_refused_by_name(tmp_path, how):
    folder = tiny.site(tmp_path / "data", count=8)
    inside = folder / "class-images"
    if how == "a link out":
        os.symlink(tiny.site(tmp_path / "elsewhere", count=3), inside)
    elif how != "none":
        inside.mkdir()
    if how == "damaged":
        (inside / "caption.txt").write_text("a photo of a flower")
        (inside / "0.png").write_bytes((folder / "0001.png").read_bytes()[:20])
    with pytest.raises(SiteError, match="SITE-15") as caught:
        site(folder)
    assert str(tmp_path) in caught.value.report() and str(tmp_path) not in str(caught.value)
    assert "a photo of a dog" in caught.value.fix
    assert site(folder, tiny.CONFIG).partition.counts["images"] == 8


def test_class_images_of_which_none_can_be_decoded_are_none(folder):
    for path in (folder / "class-images").glob("*.png"):
        path.write_bytes(path.read_bytes()[:400])  # a header, and half of the pixels
    privacy.declare_public(folder, (*data.scan(folder).photos, *prior.scan(folder).photos))
    with pytest.raises(SiteError, match="SITE-15") as caught:
        site(folder)
    assert "3 undecodable" in caught.value.found


def test_the_preflight_looks_for_them_where_the_run_asks(folder, tmp_path):
    env = {"BOUQUET_DATA": str(folder), "BOUQUET_CACHE": str(tmp_path), "RUN_CONFIG": "prior-loss-weight=1.0"}
    said = preflight.Preflight(preflight.Settings.read(env)).check_decode()
    assert said.startswith("all 8 pictures can be read") and said.endswith("; 3 class images beside them")
    (folder / "class-images").rename(folder / "others")
    with pytest.raises(SiteError, match="SITE-15"):
        preflight.Preflight(preflight.Settings.read(env)).check_decode()


# --- drawn by the base model ------------------------------------------------------------------------------------------


def test_the_base_model_draws_a_folder_of_them_that_a_site_reads_and_writes_into_no_other(tmp_path, capsys):
    photos, models = tiny.site(tmp_path / "data"), tiny.models()
    (lines := tmp_path / "prompts.txt").write_text("a white lily\n\n a pink lotus \n")
    asked = ["data", "class-images", "--base=tiny", f"--models={models}", "--size=16", "--steps=1", "--seed=5"]
    asked += ["--count=10", "--prompt=a photo of a flower", f"--prompts={lines}", f"--out={photos / 'class-images'}"]
    assert cli.main(asked) == 0
    found = prior.scan(photos)
    assert capsys.readouterr().out == f"drawn    by tiny: {found.report(3)}\n" and found.counts == {"images": 10}
    captions = [json.loads(line)["text"] for line in (found.folder / "metadata.jsonl").read_text().splitlines()]
    assert captions == (["a photo of a flower", "a white lily", "a pink lotus"] * 4)[:10]
    [ninth] = sample.render(sample.plain(tiny.base()), None, captions[8:9], tiny.config(sample_steps=1), seed=13)
    with Image.open(found.folder / "00008.png") as kept:
        assert np.abs(np.asarray(kept).astype(int) - np.asarray(ninth)).max() <= 1  # of 255: another batch
    assert cli.main(asked) == 1
    assert capsys.readouterr().err.startswith("SITE-09  ") and prior.scan(photos).counts == {"images": 10}
