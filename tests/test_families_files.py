"""Adapters of every family as files: a run's own are read back, anybody's in each tool's names, or refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app import families, model
from app.adapter import formats, lora_files, sample, store
from app.config import RunConfig
from app.errors import AdapterError
from app.families import sd
from app.hub.history import Base, Provenance
from bouquet import ROOT, cli
from bouquet.adapter import card, parity
from tests.kit import families as kit
from tests.kit import tiny
from tests.kit.memory import Federation

# diffusers' Euler under numpy 2.4
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = [name for name in kit.ALL if name not in ("sd", "sd-v")]


def config(name: str, **changes) -> RunConfig:
    return replace(tiny.config(**kit.SETTINGS), base_model=name, **changes)


def trained(name: str, run: RunConfig) -> model.Adapter:
    """Every tensor random, so that it changes the picture."""
    draw = torch.Generator().manual_seed(3)
    fresh = model.new_adapter(kit.base(name), run)
    return {key: torch.randn(value.shape, generator=draw) * 0.3 for key, value in fresh.items()}


def finished(folder: Path, name: str, **changes) -> tuple[Path, model.Adapter, RunConfig]:
    """A run's folder with its final adapter, as the hub leaves it."""
    run = config(name, **changes)
    adapter, base = trained(name, run), kit.base(name)
    told = Provenance(
        adapter_sha256=model.adapter_hash(adapter), config=run.__dict__, rounds=run.rounds,
        base=Base(name, model.fingerprint(base)["base"]), versions=formats.versions(),
    )  # fmt: skip
    formats.write_final(folder, adapter, run, families.of(base), told)
    return folder, adapter, run


# --- a run's own ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_own_files_are_read_back_as_that_adapter_with_its_layers(tmp_path, name):
    for targets in families.of(kit.base(name)).targets:
        folder, adapter, run = finished(tmp_path / targets, name, lora_targets=targets)
        found, known = formats.open_adapter(folder, models=kit.models())
        assert tiny.equal(found, adapter) and known == run
        for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
            lora = formats.read_lora(folder / "final" / file, families.of(kit.base(name)), kit.base(name))
            assert tiny.equal(lora.adapter, adapter) and (lora.rank, lora.targets) == (2, targets)


def test_a_rounds_folder_is_read_by_the_history_beside_it(tmp_path):
    run = config("zimage", lora_targets="attention+mlp")
    adapter = trained("zimage", run)
    (tmp_path / "round-0001").mkdir()
    store.write_peft(tmp_path / "round-0001", adapter, run, families.of(kit.base("zimage")))
    (tmp_path / "history.json").write_text(json.dumps({"config": run.__dict__}))
    found, known = formats.open_adapter(tmp_path / "round-0001", models=kit.models())
    assert tiny.equal(found, adapter) and known == run
    file, known = formats.open_file(tmp_path / "round-0001", models=kit.models())
    assert tiny.equal(file.net, adapter) and file.text == {} and known == run


def test_a_base_model_that_is_fetched_tells_its_family_by_its_name_and_nothing_is_fetched(tmp_path):
    family, folder = formats.family_of("z-image", tmp_path)
    assert (family.pipeline, folder) == ("ZImagePipeline", None)
    assert formats.family_of("my-own", tmp_path)[0].pipeline == "StableDiffusionPipeline"
    assert formats.family_of("../" + kit.base("zimage").name, tmp_path)[1] is None


def test_pictures_and_the_merged_model_are_made_of_a_transformers_run(tmp_path, capsys):
    folder, adapter, run = finished(tmp_path / "run", "zimage")
    asked = ["adapter", "sample", "--adapter", str(folder), "--models", str(kit.models())]
    assert cli.main([*asked, "--out", str(tmp_path / "s.png")]) == 0 and (tmp_path / "s.png").is_file()
    assert cli.main([*asked, "--merge", str(tmp_path / "merged")]) == 0
    assert "ZImagePipeline.from_pretrained" in capsys.readouterr().out
    steps = replace(run, sample_steps=2)
    by_us = parity.reference(kit.base("zimage"), adapter, steps)[1]
    assert np.abs(parity.drawn(parity.stock(tmp_path / "merged"), steps) - by_us).max() < 1e-3


# --- anybody's --------------------------------------------------------------------------------------------------------

ALPHA, RANK = 3.0, 2  # alpha / rank = 1.5, which float16's and float32's numbers are multiplied by exactly


def layers_of(name: str, *layers: str) -> model.Adapter:
    """A and B of these layers of the base model, random."""
    draw, shapes = torch.Generator().manual_seed(5), dict(model.shell(kit.base(name)).named_parameters())
    out = {}
    for layer in layers:
        rows, columns = shapes[f"{layer}.weight"].shape
        out[f"{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
        out[f"{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw)
    return out


def by_hand(adapter: model.Adapter) -> model.Adapter:
    """B times alpha / rank."""
    return {key: value * (ALPHA / RANK) if "lora_B" in key else value for key, value in adapter.items()}


def named(adapter: model.Adapter, name, down: str, up: str, alpha: str = ".alpha") -> model.Adapter:
    """The file's tensors: `name` makes the file's name of a layer's; with alpha where that has an end."""
    out = {}
    for key, value in adapter.items():
        layer, half = key.rsplit(".lora_", 1)
        out[name(layer) + (down if half.startswith("A") else up)] = value
        if alpha:
            out[name(layer) + alpha] = torch.tensor(ALPHA)
    return out


KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
ATTN = "down_blocks.1.attentions.0.transformer_blocks.0"
SDXL = (f"{ATTN}.attn1.to_q", f"{ATTN}.attn2.to_v", f"{ATTN}.attn1.to_out.0", "mid_block.attentions.0.proj_in",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k")  # fmt: skip
FLUX = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out", "transformer_blocks.0.ff.net.2")
ZIMAGE = ("layers.0.attention.to_q", "layers.1.attention.to_out.0", "noise_refiner.0.feed_forward.w2",
          "context_refiner.0.attention.to_v")  # fmt: skip
SGM = {  # one resnet and attention a block, as the tiny SDXL has: block 3 is the second's first
    "down_blocks.1.attentions.0": "input_blocks_3_1",
    "mid_block.attentions.0": "middle_block_1",
    "up_blocks.0.attentions.1": "output_blocks_1_1",
}
BFL = {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.2": "img_mlp.2"}


def sgm(layer: str) -> str:
    there = next(place for place in SGM if layer.startswith(place))
    return f"lora_unet_{SGM[there]}{layer.removeprefix(there).replace('.', '_')}"


def bfl(layer: str) -> str:
    return f"double_blocks.0.{BFL[layer.removeprefix('transformer_blocks.0.')]}"


def flat(prefix: str):
    return lambda layer: prefix + layer.replace(".", "_")


def dotted(prefix: str):
    return lambda layer: prefix + layer


FILES = {  # (base model, its layers, the name of a layer, ends)
    "SDXL, kohya's over diffusers'": ("sdxl", SDXL, flat("lora_unet_"), *KOHYA),
    "SDXL, kohya's over Stability's": ("sdxl", SDXL, sgm, *KOHYA),
    "SDXL, diffusers'": ("sdxl", SDXL, dotted("unet."), *PEFT),
    "SDXL, diffusers 0.20's": ("sdxl", SDXL, dotted("unet."), ".lora.down.weight", ".lora.up.weight"),
    "SDXL, PEFT's": ("sdxl", SDXL, dotted("base_model.model."), *PEFT),
    "Flux.1, kohya's": ("flux", FLUX, lambda layer: "lora_unet_" + bfl(layer).replace(".", "_"), *KOHYA),
    "Flux.1, ai-toolkit's": ("flux", FLUX, dotted("transformer."), *PEFT),
    "Flux.1, OneTrainer's": ("flux", FLUX[:2], flat("lora_transformer_"), *KOHYA),
    "Flux.1, BFL's in ComfyUI": ("flux", FLUX, lambda layer: f"diffusion_model.{bfl(layer)}", *PEFT),
    "Flux.1, BFL's": ("flux", FLUX, bfl, *PEFT),
    "Flux.1, BFL's by PEFT": ("flux", FLUX, lambda layer: f"base_model.model.{bfl(layer)}", *PEFT),
    "Z-Image, kohya's": ("zimage", ZIMAGE, flat("lora_unet_"), *KOHYA),
    "Z-Image, ai-toolkit's": ("zimage", ZIMAGE, dotted("diffusion_model."), *PEFT),
    "Z-Image, diffusers'": ("zimage", ZIMAGE, dotted("transformer."), *PEFT),
    "Z-Image, with the adapter's name": (
        "zimage", ZIMAGE, dotted("diffusion_model."), ".lora_A.default.weight", ".lora_B.default.weight"
    ),
}  # fmt: skip


def read(folder: Path, name: str, tensors: model.Adapter, notes: dict[str, str] | None = None) -> lora_files.LoraFile:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "x.safetensors", metadata=notes)
    return lora_files.read(folder / "x.safetensors", families.of(kit.base(name)), kit.base(name))


def drawn(pipe, run: RunConfig) -> np.ndarray:
    return parity.drawn(pipe, replace(run, sample_steps=2))


@pytest.mark.parametrize("what", FILES)
def test_each_tools_names_are_read_as_the_same_layers_with_alpha_taken_into_b(tmp_path, what):
    name, layers, naming, *ends = FILES[what]
    adapter = layers_of(name, *layers)
    assert tiny.equal(read(tmp_path, name, named(adapter, naming, *ends)).net, by_hand(adapter))
    half = {key: value.half() for key, value in named(adapter, naming, *ends, alpha="").items()}
    found = read(tmp_path, name, half, {"ss_network_alpha": "3", "ss_network_dim": "2"}).net
    assert tiny.equal(found, by_hand({key: value.half().float() for key, value in adapter.items()}))


# what loads a file is diffusers' own where it reads these names; PEFT's keys with alphas and bare BFL's it does not
LOADED = [
    "SDXL, kohya's over diffusers'", "SDXL, kohya's over Stability's", "Flux.1, kohya's", "Z-Image, kohya's",
    "Z-Image, ai-toolkit's",
]  # fmt: skip


@pytest.mark.parametrize("what", LOADED)
def test_our_picture_of_a_file_is_that_of_the_familys_own_load_lora_weights(tmp_path, what):
    name, layers, naming, *ends = FILES[what]
    run, adapter = config(name), layers_of(name, *layers)
    file = read(tmp_path, name, named(adapter, naming, *ends))
    theirs = parity.stock(kit.base(name))
    before = drawn(theirs, run)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    expected = drawn(theirs, run)
    ours = drawn(sample.dressed(kit.base(name), file, torch.device("cpu")), run)
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_layer_whose_name_is_the_end_of_anothers_is_alone_meant():
    """Flux.1 has `proj_out` and `single_transformer_blocks.0.proj_out`."""
    adapter = layers_of("flux", "proj_out", "transformer_blocks.0.attn.to_q")
    net = sample.dressed(kit.base("flux"), lora_files.LoraFile(adapter, {}), torch.device("cpu")).transformer
    assert "single_transformer_blocks.0.proj_out" in dict(net.named_modules())
    assert tiny.equal(model.adapter_of(net), adapter)


def test_one_matrix_for_query_key_and_value_becomes_three_by_its_rows(tmp_path):
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 32, generator=draw), torch.randn(96, 4, generator=draw)
    at = "lora_unet_double_blocks_0_img_attn_qkv"
    found = read(tmp_path, "flux", {f"{at}{KOHYA[0]}": a, f"{at}{KOHYA[1]}": b, f"{at}.alpha": torch.tensor(2.0)}).net
    expected = {}
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        expected[f"transformer_blocks.0.attn.{part}.lora_A.weight"] = a
        expected[f"transformer_blocks.0.attn.{part}.lora_B.weight"] = b[32 * number : 32 * number + 32] * 0.5
    assert tiny.equal(found, expected)


def test_the_real_flux_has_query_key_value_and_mlp_in_one_matrix_of_its_single_blocks(tmp_path):
    b, at = torch.arange(21504.0)[:, None].repeat(1, 2), "lora_unet_single_blocks_37_linear1"
    found = read(tmp_path, "flux", {f"{at}{KOHYA[0]}": torch.ones(2, 3072), f"{at}{KOHYA[1]}": b}).net
    rows = {"attn.to_q": 0, "attn.to_k": 3072, "attn.to_v": 6144, "proj_mlp": 9216}
    firsts = {key: value[0, 0].item() for key, value in found.items() if "lora_B" in key}
    assert firsts == {f"single_transformer_blocks.37.{part}.lora_B.weight": row for part, row in rows.items()}


def test_the_real_sdxls_numbered_blocks_are_known_without_its_folder(tmp_path):
    save_file(pair("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k"), tmp_path / "x.safetensors")
    found = lora_files.read(tmp_path / "x.safetensors", families.FAMILIES["StableDiffusionXLPipeline"]).net
    layer = "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"
    assert set(found) == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}


def test_three_layers_that_share_one_half_are_counted_as_three(tmp_path, monkeypatch):
    at = "lora_unet_double_blocks_0_img_attn_qkv"
    file = {f"{at}{KOHYA[0]}": torch.ones(4, 400), f"{at}{KOHYA[1]}": torch.ones(30, 4)}
    monkeypatch.setattr(lora_files, "MOST_NUMBERS", 3 * 4 * 400 + 4 * 30)
    found = read(tmp_path, "flux", file).net
    assert len({value.data_ptr() for value in found.values()}) == 6  # safetensors writes no tensor that shares memory
    monkeypatch.setattr(lora_files, "MOST_NUMBERS", 3 * 4 * 400 + 4 * 30 - 1)
    with pytest.raises(AdapterError, match="EXPORT-03") as refused:
        read(tmp_path, "flux", file)
    assert "numbers" in refused.value.found


def plain(name: str) -> model.Adapter:
    what = {"sdxl": "SDXL, kohya's over Stability's", "flux": "Flux.1, kohya's", "zimage": "Z-Image, kohya's"}[name]
    return named(layers_of(name, *FILES[what][1]), FILES[what][2], *FILES[what][3:])


TE = "text_model_encoder_layers_0_self_attn_q_proj"
REFUSED = {  # (base model, a tensor beside a plain file's, what the refusal says)
    "DoRA": ("flux", "lora_unet_double_blocks_0_img_mlp_2.dora_scale", "a DoRA"),
    "LoHa": ("sdxl", "lora_unet_input_blocks_3_1_proj_in.hada_w1_a", "a LoHa"),
    "LoKr": ("zimage", "diffusion_model.layers.0.attention.to_q.lokr_w1", "a LoKr"),
    "LyCORIS": ("flux", "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight", "LyCORIS"),
    "whole weights": ("flux", "diffusion_model.double_blocks.0.img_mod.lin.diff", "whole weights"),
    "the first text encoder": ("sdxl", f"lora_te1_{TE}.lora_down.weight", "text encoder"),
    "the second text encoder": ("sdxl", f"lora_te2_{TE}.lora_down.weight", "text encoder"),
    "a text encoder of Flux": ("flux", f"lora_te1_{TE}.lora_down.weight", "text encoder"),
    "T5": ("flux", "text_encoders.t5xxl.transformer.encoder.block.0.lora_down.weight", "text encoder"),
    "a text encoder by diffusers": ("sdxl", "text_encoder_2.text_model.encoder.x.lora_A.weight", "text encoder"),
    "Flux in SDXL": ("sdxl", "lora_unet_double_blocks_0_img_mlp_2.lora_down.weight", "transformer"),
    "a UNet in Z-Image": ("zimage", "lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "UNet"),
    "a bias": ("zimage", "diffusion_model.layers.0.attention.to_q.lora_B.bias", "biases"),
    "no LoRA tensor": ("zimage", "layers.0.attention.to_q.weight", "no LoRA tensor"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_run_could_not_train_from_is_refused_by_its_kind(tmp_path, what):
    name, key, said = REFUSED[what]
    with pytest.raises(AdapterError, match="EXPORT-03") as refused:
        read(tmp_path, name, plain(name) | {key: torch.ones(2, 2)})
    assert said in refused.value.found and families.of(kit.base(name)).label in refused.value.fix


def pair(name: str, down: str = KOHYA[0], up: str = KOHYA[1]) -> model.Adapter:
    return {f"{name}{down}": torch.ones(2, 8), f"{name}{up}": torch.ones(8, 2)}


DROPPED = {  # layers that diffusers leaves out, or leaves as they are, without an error
    "both of SDXL's namings": ("sdxl", pair("lora_unet_down_blocks_1_attentions_0_proj_in")),
    "a block that Flux.1 does not have": ("flux", pair("lora_unet_double_blocks_19_img_mlp_2")),
    "Stability's names in a file of diffusers' form": ("sdxl", pair("unet.input_blocks.3.1.proj_in", *PEFT)),
    "SD3's names in kohya's form": ("sd3", pair("lora_unet_joint_blocks_0_x_block_attn_qkv")),
}


@pytest.mark.parametrize("what", DROPPED)
def test_a_layer_that_would_be_lost_on_the_way_refuses_the_file(tmp_path, what):
    name, more = DROPPED[what]
    with pytest.raises(AdapterError, match="EXPORT-03"):
        read(tmp_path, name, (plain(name) if name in ("sdxl", "flux") else {}) | more)


def test_the_file_itself_is_never_handed_to_diffusers(tmp_path, monkeypatch):
    given = []

    def told(cls, said, **how):
        given.append(said)
        return {}

    monkeypatch.setattr("diffusers.ZImagePipeline.lora_state_dict", classmethod(told))
    with pytest.raises(AdapterError, match="EXPORT-03"):
        read(tmp_path, "zimage", plain("zimage"))
    assert [type(said) for said in given] == [dict]


# --- start-from -------------------------------------------------------------------------------------------------------


def test_a_run_of_a_transformer_begins_with_somebodys_lora(tmp_path, monkeypatch):
    settings = kit.SETTINGS | {"lora_targets": "attention+mlp", "sample_prompts": ""}
    federation = Federation(
        tmp_path,
        models=kit.models(),
        base_model=kit.base("zimage").name,
        rounds=1,
        start_from="x.safetensors",
        **settings,
    )
    save_file(plain("zimage"), federation.adapters / "x.safetensors")
    federation.go(monkeypatch)
    sent = federation.grid.adapters("1", federation.grid.sent)["site-1"]
    expected = by_hand(layers_of("zimage", *ZIMAGE))
    assert len(sent) > len(expected) and all(torch.equal(sent[key], value) for key, value in expected.items())


def test_another_familys_lora_is_refused_before_anybody_is_asked(tmp_path, monkeypatch):
    federation = Federation(
        tmp_path, models=kit.models(), base_model=kit.base("zimage").name, start_from="x.safetensors", **kit.SETTINGS
    )
    tensors = layers_of("flux", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")
    save_file({f"transformer.{key}": value for key, value in tensors.items()}, federation.adapters / "x.safetensors")
    assert "none of its 2 layers" in federation.fails(monkeypatch, "EXPORT-03").found
    assert federation.grid.sent == []


# --- its way to people ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [("zimage", "transformer"), ("sdxl", "UNet")])
def test_a_run_is_published_with_its_familys_files_and_a_card_whose_snippet_runs(
    tmp_path, capsys, monkeypatch, name, part
):
    folder, _, run = finished(tmp_path / "run", name, sample_steps=2)
    family = families.of(kit.base(name))
    asked = ["--adapter", str(folder), "--models", str(kit.models()), "--licence", "mit"]
    assert cli.main(["adapter", "publish", "garden/flowers", *asked, "--base-id", "garden/base"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("same     ") == (7 if family.kohya else 5)
    listed = set(re.findall(r"^file +[\d,]+ +(\S+)$", shown, re.MULTILINE))
    files = {f"{place}{file}" for place in ("", "fp16/") for file in formats.files(family)}
    assert listed == files | {"README.md", "provenance.json", "images/1.png", "images/before-after.png"}
    assert ("kohya.safetensors" in listed) == family.kohya
    page = (folder / "final" / "README.md").read_text()
    data = yaml.safe_load(page.split("---\n")[1])
    assert (data["base_model"], data["base_model_relation"]) == ("garden/base", "adapter")
    assert family.label.lower() in data["tags"] and "stable-diffusion" not in data["tags"]
    assert f"attention of the {part} |" in page and ("kohya.safetensors" in page) == family.kohya
    [snippet] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert f"{family.pipeline}.from_pretrained" in snippet
    monkeypatch.chdir(tmp_path)
    places = {"garden/base": str(kit.base(name)), "garden/flowers": str(folder / "final")}
    for there, here in places.items():
        snippet = snippet.replace(there, here)
    exec(compile(snippet.replace("pipe(", "pipe(num_inference_steps=2, prompt="), "README.md", "exec"), {})
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (run.resolution, run.resolution)


def test_every_base_model_that_is_fetched_has_a_licence_that_the_card_names():
    named = {
        name: repository for family in families.FAMILIES.values() for name, repository in family.repositories.items()
    }
    for name, repository in named.items():
        under = card.licence(RunConfig.read({"base-model": name}), None)
        assert (under == card.OTHER) == (name in card.LICENCE_NAMES) == repository.gated
    told = card.card(
        "a/b",
        RunConfig.read({"base-model": "flux.1-dev"}),
        Provenance(),
        [],
        card.OTHER,
        "black-forest-labs/FLUX.1-dev",
    )
    data = yaml.safe_load(told.split("---\n")[1])
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert data["license_link"] == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"


# --- what a file says of itself ---------------------------------------------------------------------------------------


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def written(folder: Path, pipeline: str, key: str, width: int, base_model: str = "a") -> tuple[dict[str, str], ...]:
    """The metadata of kohya's and diffusers' file with one layer, which hears a text of that width."""
    adapter = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(4, 2)}
    family, run = families.FAMILIES[pipeline], tiny.config(base_model=base_model, lora_targets="attention")
    for write in (formats.write_diffusers, formats.write_kohya):
        write(folder, adapter, run, family)
    return metadata(folder / formats.KOHYA), metadata(folder / formats.DIFFUSERS)


ARCHITECTURES = {  # (pipeline, a layer, its text's width, base-model), what both files say of the base model
    "1.x": (("StableDiffusionPipeline", ATTN + ".attn2.to_k", 768), ("stable-diffusion-v1/lora", "sd_v1")),
    "2.x": (("StableDiffusionPipeline", ATTN + ".attn2.to_k", 1024), (None, None)),
    "neither": (("StableDiffusionPipeline", ATTN + ".attn2.to_k", 32), (None, None)),
    "SDXL": (
        ("StableDiffusionXLPipeline", ATTN + ".attn2.to_k", 2048),
        ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
    ),
    "Flux.1 dev": (
        ("FluxPipeline", "transformer_blocks.0.attn.to_q", 8, "flux.1-dev"), ("flux-1-dev/lora", "flux1")
    ),
    "Flux.1, perhaps schnell": (("FluxPipeline", "transformer_blocks.0.attn.to_q", 8, "flux.1-mine"), (None, None)),
    "Z-Image": (("ZImagePipeline", "layers.0.attention.to_q", 8, "z-image"), (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("what", ARCHITECTURES)
def test_files_say_what_base_model_they_are_for_where_modelspec_and_kohya_have_a_name_for_it(tmp_path, what):
    given, (architecture, version) = ARCHITECTURES[what]
    for notes in written(tmp_path, *given):
        assert notes.get("modelspec.architecture") == architecture and notes.get("ss_base_model_version") == version
        assert notes["modelspec.sai_model_spec"] == "1.0.0" and notes["modelspec.resolution"] == "16x16"
        assert notes["modelspec.implementation"] == "diffusers" and notes["modelspec.title"].startswith("LoRA of ")
    kohya, _ = written(tmp_path, *given)
    assert kohya["ss_v2"] == str(what == "2.x")


WRITE = """
import sys
from pathlib import Path
from app.adapter import formats
from app.families import sd
from tests.kit import tiny

formats.write_formats(Path(sys.argv[1]), tiny.adapter(3), tiny.CONFIG, sd.FAMILY)
"""


@pytest.mark.slow
def test_the_same_adapter_makes_the_same_bytes_in_every_process(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    formats.write_formats(here, tiny.adapter(3), tiny.CONFIG, sd.FAMILY)
    other = os.environ | {"PYTHONHASHSEED": "1"}  # names in another order, wherever a set decides
    subprocess.run([sys.executable, "-c", WRITE, str(there)], cwd=ROOT, env=other, check=True)
    for name in formats.files(sd.FAMILY):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert tiny.equal(store.read_adapter(here), tiny.adapter(3))


def test_tensors_begin_at_a_multiple_of_eight_whatever_the_notes_say(tmp_path):
    for length in range(8):
        store.save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", {"title": "ß" * length})
        assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0
        assert metadata(tmp_path / "x.safetensors") == {"format": "pt", "title": "ß" * length}
        assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3))
