"""Every model family, tiny and offline: encoded, trained by two sites and a hub, and drawn again from the files.

What a family's arithmetic should be is written down here anew, as diffusers' own training scripts have it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from app import families, model
from app.config import RunConfig
from app.errors import ModelError
from app.families import base as bases
from app.families import sd
from app.families.base import Conditions, stacked
from app.families.noise import Flow
from app.site import cache, diffusion, train
from app.site.photos import data
from app.site.photos.views import Plan
from benchmarks.gpu import gpu_families
from bouquet.adapter import parity
from bouquet.site import estimate
from tests.kit import families as kit
from tests.kit import tiny
from tests.kit.families import SETTINGS
from tests.kit.memory import Federation

CPU = torch.device("cpu")
FLOWS = ("sd3", "flux", "flux2", "zimage", "qwen-image")
CAPTIONS = ["a red poppy", "a white lily at night", "", "x"]


def config(name: str, **changes: Any) -> RunConfig:
    return tiny.config(base_model=name, **SETTINGS | changes)


def photos(name: str, count: int = 4) -> cache.Encoded:
    """Random latents of the family's shape, and real conditions of four captions."""
    family, base = families.of(kit.base(name)), kit.base(name)
    parts = {part: model.load(base, part) for part in family.words}
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        pixels = torch.rand(count, 3, kit.SIDE, kit.SIDE, generator=draw) * 2 - 1
        latents = family.latents(model.load(base, "vae"), pixels)
        texts = family.text(parts, ["", *CAPTIONS[:count]], family.tokens(base))
    sizes = torch.tensor([[64, 48, 0, 0, kit.SIDE, kit.SIDE]]).expand(count, -1)
    return cache.Encoded(latents, texts, torch.arange(count) + 1, sizes, [f"photo {n}" for n in range(count)])


# --- a federation a family --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler under numpy 2.4
@pytest.mark.parametrize("name", [name for name in kit.ALL if name not in ("sd", "sd-v")])
def test_two_sites_train_it_and_its_files_draw_in_its_own_pipeline_what_the_training_saw(name, tmp_path, monkeypatch):
    """The hub's half and the sites' half in one process; loss falls; PEFT's, diffusers' and kohya's files, in whole and
    half precision, and the merged model.
    """
    kit.base(name)
    federation = Federation(tmp_path, models=kit.models(), base_model=name, **SETTINGS)
    final = federation.go(monkeypatch) / "final"
    seen = [entry["weighted"] for entry in federation.history()["validation"]]
    assert seen[0] > seen[1] > seen[2]
    assert (final.parent / "samples.png").exists()
    assert (final / "kohya.safetensors").exists() == (name == "sdxl")
    rows = parity.check(final, kit.base(name), config(name))
    assert {row.path for row in rows} == {"PEFT", "diffusers", "merged"} | ({"kohya"} if name == "sdxl" else set())
    whole = {row.path: row.difference for row in rows if row.precision == "fp32"}
    assert whole["diffusers"] == 0.0 and max(whole.values()) < 1e-4


@pytest.mark.parametrize("name", kit.ALL)
def test_the_loss_of_a_fixed_batch_falls_with_gradient_checkpointing_too(name):
    run = config(name, local_steps=12, batch_size=4, gradient_checkpointing=True, caption_dropout=0.0)
    objective, net = train.load(kit.base(name), run, train.accelerator(run))
    encoded, fixed = photos(name), torch.Generator()
    measure = lambda: diffusion.validation_loss(net.eval(), objective, encoded, CPU, timesteps=4, batch_size=4)  # noqa: E731
    before = measure()
    train.fit(net, objective, encoded, run, train.accelerator(run), seed=int(fixed.manual_seed(1).initial_seed()))
    assert measure() < 0.95 * before


@pytest.mark.parametrize("name", kit.ALL)
def test_what_the_base_model_predicts_is_asked_of_the_net_without_its_adapter(name):
    """A fresh adapter changes nothing; one that does is away from the base, and as far after it was asked again."""
    run = config(name)
    objective, net = train.load(kit.base(name), run, train.accelerator(run))
    rows, given = photos(name).batch(torch.arange(2))

    def away() -> float:
        return diffusion.noise_loss(net, objective, rows, given, torch.Generator().manual_seed(1), kept=True).item()

    assert away() == 0.0
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter += 0.1 * (".lora_B." in key)
    assert away() == away() > 0.0
    assert {".lora_" in key for key, parameter in net.named_parameters() if parameter.requires_grad} == {True}


# --- the arithmetic ---------------------------------------------------------------------------------------------------


class Listening(torch.nn.Module):
    """In a net's place: keeps what it is asked, and answers what the test says."""

    dtype = torch.float32

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.net = net.config, net
        self.asked: dict[str, Any] = {}

    def forward(self, *args: Any, **given: Any) -> Any:
        self.asked = {"args": args} | given
        return self.net(*args, **given)


def flow_as_diffusers_scripts_have_it(scheduler: Any, z: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy, timesteps, target): train_dreambooth_lora_sd3.py, _flux.py, _z_image.py with logit-normal weighting."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(z.shape, generator=draw)
    u = compute_density_for_timestep_sampling("logit_normal", len(z), 0.0, 1.0, generator=draw)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    steps = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas[steps].flatten().view(-1, 1, 1, 1)
    return (1.0 - sigmas) * z + sigmas * noise, timesteps, noise - z


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_noised_timed_and_targeted_as_in_diffusers_training_scripts(name):
    objective, encoded = diffusion.Objective.of(kit.base(name)), photos(name)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(kit.base(name), subfolder="scheduler")
    z = encoded.latents_NChw
    noisy, timesteps, target = flow_as_diffusers_scripts_have_it(scheduler, z, 5)
    draw = torch.Generator().manual_seed(5)
    n, t = torch.randn(z.shape, generator=draw), objective.schedule.draw(len(z), draw)
    torch.testing.assert_close(objective.schedule.noisy(z, n, t), noisy)
    assert torch.equal(objective.schedule.told(t), timesteps)
    assert torch.equal(objective.schedule.target(z, n, t), target)


def as_scripts_call(name: str, net: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
    """The prediction as each of diffusers' training scripts computes it, from its pipeline's own helpers."""
    count, channels, height, width = noisy.shape
    if name == "sd3":
        return net(noisy, given["text"], given["pooled"], timesteps).sample
    if name == "zimage":
        rows = [row[:length] for row, length in zip(given["text"], given["mask"].sum(1), strict=True)]
        out = net(list(noisy.unsqueeze(2).unbind(dim=0)), (1000 - timesteps) / 1000, rows, return_dict=False)[0]
        return -torch.stack(out, dim=0).squeeze(2)
    if name == "flux":
        pipe = diffusers.FluxPipeline
        out = net(
            hidden_states=pipe._pack_latents(noisy, count, channels, height, width), timestep=timesteps / 1000,
            guidance=torch.tensor([1.0]).expand(count), pooled_projections=given["pooled"],
            encoder_hidden_states=given["text"], txt_ids=torch.zeros(given["text"].shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, CPU, torch.float32),
            return_dict=False,
        )[0]  # fmt: skip
        vae_scale_factor = 2
        return pipe._unpack_latents(out, height * vae_scale_factor, width * vae_scale_factor, vae_scale_factor)
    if name == "flux2":
        pipe = diffusers.Flux2KleinPipeline
        ids = pipe._prepare_latent_ids(noisy)
        out = net(
            hidden_states=pipe._pack_latents(noisy), timestep=timesteps / 1000, guidance=None,
            encoder_hidden_states=given["text"], txt_ids=pipe._prepare_text_ids(given["text"]), img_ids=ids,
            return_dict=False,
        )[0]  # fmt: skip
        return pipe._unpack_latents_with_ids(out, ids)
    pipe = diffusers.QwenImagePipeline
    out = net(
        hidden_states=pipe._pack_latents(noisy.unsqueeze(1), count, channels, height, width),
        encoder_hidden_states=given["text"], encoder_hidden_states_mask=given["mask"].long(), timestep=timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * count, return_dict=False,
    )[0]  # fmt: skip
    return pipe._unpack_latents(out, height * 8, width * 8, 8)[:, :, 0]


@pytest.mark.parametrize("name", FLOWS)
def test_the_loss_is_that_of_diffusers_training_script_on_the_same_tensors(name):
    encoded, base = photos(name), kit.base(name)
    objective, net = diffusion.Objective.of(base), model.load_net(base)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    z, given = encoded.batch(torch.arange(4))
    noisy, timesteps, target = flow_as_diffusers_scripts_have_it(scheduler, z, 9)
    with torch.no_grad():
        expected = (as_scripts_call(name, net, noisy, timesteps, given) - target).square().mean()
        loss = diffusion.noise_loss(net, objective, z, given, torch.Generator().manual_seed(9))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sdxls_loss_is_that_of_diffusers_script_with_its_pooled_text_and_time_ids():
    """train_text_to_image_lora_sdxl.py: original size, top left of the crop, target size."""
    encoded, base = photos("sdxl"), kit.base("sdxl")
    objective, net = diffusion.Objective.of(base), model.load_net(base)
    scheduler = diffusers.DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    z, given = encoded.batch(torch.arange(4))
    draw = torch.Generator().manual_seed(2)
    noise, t = torch.randn(z.shape, generator=draw), torch.randint(1000, (4,), generator=draw)
    time_ids = torch.tensor([[64, 48] + [0, 0] + [32, 32]] * 4)
    added = {"time_ids": time_ids, "text_embeds": given["pooled"]}
    with torch.no_grad():
        out = net(scheduler.add_noise(z, noise, t), t, given["text"], added_cond_kwargs=added).sample
        loss = diffusion.noise_loss(net, objective, z, given, torch.Generator().manual_seed(2))
    assert loss.item() == pytest.approx((out - noise).square().mean().item(), rel=1e-5)


def test_a_caption_counts_in_sdxl_by_both_its_text_and_its_pooled_text_and_the_sizes_count():
    encoded, base = photos("sdxl"), kit.base("sdxl")
    objective, net = diffusion.Objective.of(base), model.load_net(base)
    z, given = encoded.batch(torch.arange(4))

    def loss(**other: Tensor) -> float:
        return diffusion.noise_loss(net, objective, z, given | other, torch.Generator().manual_seed(2)).item()

    plain = loss()
    assert all(loss(**{name: given[name] + 7}) != pytest.approx(plain, rel=1e-6) for name in ("text", "pooled", "size"))


def test_flow_levels_by_hand():
    """Three levels, the middle one at sigma 0.5: half latents, half noise; the net hears 500 of 1000."""
    flow = Flow(torch.tensor([1.0, 0.5, 0.25]), torch.tensor([1000.0, 500.0, 250.0]))
    z, n, t = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 6.0), torch.tensor([1, 2])
    assert flow.noisy(z, n, t).flatten().tolist() == [4.0, 3.0]
    assert flow.target(z, n, t).flatten().tolist() == [4.0, 4.0]
    assert flow.told(t).tolist() == [500.0, 250.0] and flow.steps == 3


def test_flow_levels_are_drawn_around_the_middle_and_never_beyond_the_last():
    flow = Flow(torch.linspace(1, 0.001, 1000), torch.linspace(1000, 1, 1000))
    drawn = flow.draw(20_000, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() <= 999
    # sigmoid of a standard normal: a half below 0.5; 0.6827 between sigmoid(-1) = 0.2689 and sigmoid(1) = 0.7311
    assert (drawn < 500).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert ((drawn >= 269) & (drawn < 731)).float().mean().item() == pytest.approx(0.6827, abs=0.02)


def test_every_photo_is_validated_once_in_each_equal_part_of_the_familys_own_time():
    flow, seen = diffusion.Objective.of(kit.base("zimage")).schedule, []
    for key in ("rose", "lily"):
        _, t = diffusion.fixed_noise(diffusion.sha256(key), torch.Size((4, 2, 2)), 4, flow.steps)
        seen.append((t // 250).tolist())
    assert seen == [[0, 1, 2, 3]] * 2


# --- latents and captions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kit.ALL)
def test_latents_decode_in_the_pipelines_own_way_to_what_the_autoencoder_makes_of_its_mean(name):
    """The way back is the pipeline's, which each family has in its own words."""
    base, family = kit.base(name), families.of(kit.base(name))
    vae, pixels = model.load(base, "vae"), torch.rand(2, 3, kit.SIDE, kit.SIDE, generator=torch.Generator()) * 2 - 1
    film = pixels.unsqueeze(2) if name == "qwen-image" else pixels
    with torch.no_grad():
        z, mean = family.latents(vae, pixels), vae.encode(film).latent_dist.mean
    if name == "qwen-image":
        spread = 1.0 / torch.tensor(vae.config.latents_std).view(1, 4, 1, 1, 1)
        back = z.unsqueeze(2) / spread + torch.tensor(vae.config.latents_mean).view(1, 4, 1, 1, 1)
    elif name == "flux2":
        bn_mean = vae.bn.running_mean.view(1, -1, 1, 1)
        bn_std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        back = diffusers.Flux2KleinPipeline._unpatchify_latents(z * bn_std + bn_mean)
    else:
        back = z / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    torch.testing.assert_close(back, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", kit.ALL)
def test_a_caption_is_encoded_alike_alone_and_among_others_of_other_lengths(name):
    base, family = kit.base(name), families.of(kit.base(name))
    parts = {part: model.load(base, part) for part in family.words}
    with torch.no_grad():
        together = family.text(parts, CAPTIONS, family.tokens(base))
        alone = [family.text(parts, [caption], family.tokens(base))[0] for caption in CAPTIONS]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys() and all(one[key].shape == other[key].shape for key in one)
        assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


@pytest.mark.parametrize("name", ["zimage", "qwen-image"])
def test_padding_in_a_batch_changes_nothing_for_a_caption_that_is_shorter(name):
    encoded, base = photos(name), kit.base(name)
    objective, net = diffusion.Objective.of(base), model.load_net(base).eval()
    lengths = {len(text["text"]) for text in encoded.texts}
    assert len(lengths) > 2
    noise, t = torch.randn(4, *encoded.latents_NChw.shape[1:], generator=torch.Generator()), torch.tensor([100] * 4)
    with torch.no_grad():
        z, given = encoded.batch(torch.arange(4))
        together = diffusion.losses(net, objective, z, given, noise, t)
        for number in range(4):
            z, given = encoded.batch(torch.tensor([number]))
            alone = diffusion.losses(net, objective, z, given, noise[number : number + 1], t[:1])
            torch.testing.assert_close(alone, together[number : number + 1], rtol=1e-4, atol=1e-5)


def test_stacked_pads_with_zeros_and_says_where_tokens_are():
    rows = [{"text": torch.ones(2, 3), "pooled": torch.ones(1)}, {"text": torch.ones(4, 3), "pooled": torch.zeros(1)}]
    given = stacked(rows)
    assert given["text"].shape == (2, 4, 3) and given["text"].sum(dim=(1, 2)).tolist() == [6.0, 12.0]
    assert given["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert given["pooled"].tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("name", ["sdxl", "zimage"])
def test_what_was_encoded_once_is_read_again_bit_for_bit_and_keeps_its_lengths(name, tmp_path):
    folder, base = tiny.site(tmp_path / "data", 6), kit.base(name)
    sums = model.fingerprint(base)

    def encode() -> cache.Encoded:
        partition, rows = cache.encode(data.scan(folder), base, sums, Plan.square(kit.SIDE), tmp_path / "cache", CPU)
        return rows(partition.photos)

    first, again = encode(), encode()
    assert (
        torch.equal(first.latents_NChw, again.latents_NChw) and first.sizes_R6.tolist() == [[16, 16, 0, 0, 32, 32]] * 6
    )
    for one, other in zip(first.texts, again.texts, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert {value.dtype for value in one.values()} == {families.of(base).kept}
    if name == "zimage":
        assert len({len(text["text"]) for text in first.texts}) > 1


# --- the real architectures, without weights --------------------------------------------------------------------------

KLEIN = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
REAL = {  # the real net's class and settings, `lora-targets`, millions of parameters at rank 16, one of its layers
    "SDXL": (
        "StableDiffusionXLPipeline", gpu_families.SDXL, "attention", 23.2,
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k",
    ),
    "Z-Image": ("ZImagePipeline", {}, "attention", 16.7, "layers.29.attention.to_q"),
    "Flux.2-klein-4B": (
        "Flux2KleinPipeline", KLEIN, "attention", 11.8, "single_transformer_blocks.19.attn.to_qkv_mlp_proj"
    ),
    "Flux.1": (
        "FluxPipeline", {"guidance_embeds": True}, "attention+mlp", 44.8, "transformer_blocks.18.ff_context.net.2"
    ),
    "Qwen-Image": ("QwenImagePipeline", {}, "attention", 23.6, "transformer_blocks.59.attn.to_out.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_real_architecture_gets_as_many_parameters_as_were_counted_and_layers_by_the_names_people_know(name):
    pipeline, settings, targets, millions, layer = REAL[name]
    family = families.FAMILIES[pipeline]
    with torch.device("meta"):
        net = getattr(diffusers, family.classes[family.net][0])(**settings).requires_grad_(False)
        model.add_adapter(net, family, RunConfig.read({"lora-rank": 16, "lora-targets": targets}))
    adapter = {key for key, value in net.named_parameters() if value.requires_grad}
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) / 1e6 == pytest.approx(millions, abs=0.05)
    assert any(key.startswith(f"{layer}.lora_A") for key in adapter)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kit.ALL)
def test_the_estimate_counts_every_family_without_its_weights(name):
    run = config(name, batch_size=2)
    found = estimate.estimate(kit.base(name), run, half=False, on_gpu=True)
    net = model.load_net(kit.base(name))
    frozen = sum(p.numel() for p in net.parameters()) * 4
    net.add_adapter(LoraConfig(r=2, target_modules=list(families.of(kit.base(name)).targets["attention"])))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad) * 4
    assert found.floor > frozen + 4 * trained and found.need > found.peak >= found.floor - 1
    more = estimate.estimate(kit.base(name), replace(run, batch_size=8), half=False, on_gpu=True)
    assert more.peak > found.peak


def test_what_a_family_is_given_has_the_shapes_that_the_estimate_takes():
    for name in kit.ALL:
        base, family = kit.base(name), families.of(kit.base(name))
        z, given = photos(name).batch(torch.arange(4))
        guess = estimate.inputs(base, family, (kit.SIDE, kit.SIDE), 4)
        assert guess.latents.shape == z.shape
        widest = {key: (value.shape[0], *value.shape[2:]) for key, value in guess.given.items() if key == "text"}
        assert widest == {"text": (given["text"].shape[0], *given["text"].shape[2:])}
        assert {key: value.shape for key, value in guess.given.items() if key == "pooled"} == {
            key: value.shape for key, value in given.items() if key == "pooled"
        }
        assert bases.ATTENTION == sd.ATTENTION


# --- the hub's half, which needs no weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in kit.ALL if name != "sd-v"])
def test_the_first_adapter_is_the_same_bit_for_bit_where_the_net_is_there_by_its_shapes_alone(name):
    base, run = kit.base(name), config(name)
    net = model.shell(base)
    model.add_adapter(net, families.of(base), run)
    whole = model.load_net(base)
    model.add_adapter(whole, families.of(base), run)
    assert tiny.equal(model.adapter_of(net), model.adapter_of(whole))
    assert tiny.equal(model.new_adapter(base, run), model.adapter_of(whole))
    frozen = sum(p.untyped_storage().nbytes() for p in net.parameters() if not p.requires_grad)
    assert frozen == 4 * sum(not p.requires_grad for p in net.parameters())  # four bytes a tensor, however large


@pytest.mark.parametrize("change", ["missing", "of another shape", "beside the net's"])
def test_a_net_whose_files_do_not_hold_its_tensors_is_refused_from_their_headers(change, tmp_path):
    folder = shutil.copytree(kit.base("zimage"), tmp_path / "zimage")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if change == "missing":
        del tensors[first]
    elif change == "of another shape":
        tensors[first] = tensors[first][..., :1].contiguous()
    else:
        tensors["another"] = torch.zeros(1)
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        model.check(folder)
    assert caught.value.code == "MODEL-03" and (first in caught.value.found or "another" in caught.value.found)
