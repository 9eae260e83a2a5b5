"""LoRA files as people have them: each is read with the strength that it says, or refused by name."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from app import model
from app.adapter import formats, lora_files, sample
from app.config import RunConfig
from app.errors import AdapterError
from bouquet.adapter import sample as sample_
from tests.kit import tiny

ADAPTER = tiny.adapter(3, tiny.config(lora_targets="attention"))
LAYERS = sorted({key.rsplit(".lora_", 1)[0] for key in ADAPTER})
LAYER = LAYERS[0]
TE = "encoder.layers.0.self_attn.q_proj"
ENDS = (("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight"))


def renamed(
    before: str = "", a: str = ".lora_A.weight", b: str = ".lora_B.weight", name=lambda layer: layer
) -> dict[str, torch.Tensor]:
    """The adapter under other names."""
    out = {}
    for layer in LAYERS:
        out[f"{before}{name(layer)}{a}"], out[f"{before}{name(layer)}{b}"] = (
            ADAPTER[f"{layer}.lora_A.weight"],
            ADAPTER[f"{layer}.lora_B.weight"],
        )
    return out


def kohya(alpha: float | None = None) -> dict[str, torch.Tensor]:
    out = renamed("", ".lora_down.weight", ".lora_up.weight", formats.kohya_name)
    return out | (
        {f"{formats.kohya_name(layer)}.alpha": torch.tensor(float(alpha)) for layer in LAYERS}
        if alpha is not None
        else {}
    )


def read(tmp_path, tensors, notes=None, name="flowers.safetensors") -> lora_files.LoraFile:
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=notes)
    return lora_files.read(tmp_path / name)


def refusal(tmp_path, tensors, notes=None, **how) -> str:
    with pytest.raises(AdapterError, match="EXPORT-03") as caught:
        read(tmp_path, tensors, notes, **how)
    return caught.value.found


# --- names ------------------------------------------------------------------------------------------------------------


def processors(layer: str) -> str:
    """As diffusers before 0.17 named an attention processor's LoRA."""
    before, _, last = layer.rpartition(".to_")
    return f"{before}.processor.to_{last.removesuffix('.0')}_lora"


OLD = {"a": ".down.weight", "b": ".up.weight", "name": processors}
NAMES = {
    "PEFT": {},
    "PEFT with its model": {"before": "base_model.model."},
    "PEFT with its model and net": {"before": "base_model.model.unet."},
    "PEFT with the adapter's name": {"a": ".lora_A.default.weight", "b": ".lora_B.default.weight"},
    "diffusers": {"before": "unet."},
    "diffusers 0.20": {"before": "unet.", "a": ".lora.down.weight", "b": ".lora.up.weight"},
    "diffusers 0.14": OLD,
    "diffusers 0.16": OLD | {"before": "unet."},
    "ComfyUI's": {"before": "diffusion_model."},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_every_tool_are_read_as_the_same_adapter(tmp_path, name):
    file = read(tmp_path, renamed(**NAMES[name]))
    assert tiny.equal(file.net, ADAPTER) and file.text == {}


WORDS = (
    "conv_in conv_out time_embedding.linear_1 down_blocks.0.resnets.0.conv_shortcut down_blocks.0.downsamplers.0.conv "
    "down_blocks.0.resnets.0.time_emb_proj up_blocks.1.attentions.0.proj_in up_blocks.1.attentions.0.proj_out "
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj up_blocks.0.upsamplers.0.conv mid_block.resnets.1.conv2 "
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
)


@pytest.mark.parametrize("layer", WORDS.split())
def test_kohyas_flat_names_lead_back_to_every_layer_of_the_unet(tmp_path, layer):
    flat = formats.kohya_name(layer)
    file = read(tmp_path, {f"{flat}.lora_down.weight": torch.ones(2, 8), f"{flat}.lora_up.weight": torch.ones(8, 2)})
    assert set(file.net) == {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"}


TEXTS = {
    "kohya": f"lora_te_text_model_{TE.replace('.', '_')}.lora_down.weight",
    "diffusers": f"text_encoder.text_model.{TE}.lora_A.weight",
    "diffusers 0.20": f"text_encoder.text_model.{TE}.lora_linear_layer.down.weight",
    "diffusers 0.16": f"text_encoder.text_model.{TE.replace('q_proj', 'to_q_lora')}.down.weight",
    "PEFT": f"base_model.model.text_model.{TE}.lora_A.weight",
    "PEFT, flat": f"base_model.model.{TE}.lora_A.weight",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_encoders_layers_are_read_beside_the_unets(tmp_path, name):
    up = TEXTS[name].replace("lora_A", "lora_B").replace("down", "up")
    file = read(tmp_path, renamed("unet.") | {TEXTS[name]: torch.full((3, 16), 2.0), up: torch.full((16, 3), 3.0)})
    assert tiny.equal(file.net, ADAPTER)
    assert tiny.equal(
        file.text, {f"{TE}.lora_A.weight": torch.full((3, 16), 2.0), f"{TE}.lora_B.weight": torch.full((16, 3), 3.0)}
    )


# --- strength ---------------------------------------------------------------------------------------------------------

HALF = sample.scaled(ADAPTER, 0.5)  # alpha 1 at rank 2
METADATA = {
    "format": "pt",
    "lora_adapter_metadata": json.dumps(
        {"unet.r": 2, "unet.lora_alpha": 1, "text_encoder.r": 4, "text_encoder.lora_alpha": 16}
    ),
}


def test_alpha_is_the_rank_where_nobody_says_another(tmp_path):
    assert tiny.equal(read(tmp_path, kohya()).net, ADAPTER) and tiny.equal(read(tmp_path, kohya(2)).net, ADAPTER)


@pytest.mark.parametrize(
    ("tensors", "notes"),
    [
        (kohya(1), None),
        (kohya(1), {"ss_network_alpha": "2"}),  # a tensor's own alpha comes first
        (kohya(), {"ss_network_dim": "2", "ss_network_alpha": "1"}),
        (kohya(), {"ss_network_alpha": "1.0"}),
        (renamed("unet."), METADATA),
    ],
)
def test_alpha_is_taken_from_where_the_file_has_it(tmp_path, tensors, notes):
    assert tiny.equal(read(tmp_path, tensors, notes).net, HALF)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "flowers.safetensors"])
def test_alpha_is_taken_from_pefts_settings_beside_the_file_whatever_it_is_called(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    assert tiny.equal(read(tmp_path, renamed("base_model.model."), name=name).net, HALF)


@pytest.mark.parametrize(
    "tensors", [kohya(), kohya(2), renamed("unet.")], ids=["kohya", "kohya with alpha", "diffusers"]
)
def test_pefts_settings_beside_a_file_that_is_not_pefts_are_another_files(tmp_path, tensors):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    assert tiny.equal(read(tmp_path, tensors).net, ADAPTER)


def test_settings_that_do_not_fit_the_tensors_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 8}))
    assert "rank 8" in refusal(tmp_path, renamed("base_model.model."))


@pytest.mark.parametrize("key", [LAYER, f"^{LAYER}", LAYER.split(".", 1)[1], f"{LAYER}$".replace(".", "\\.")])
def test_an_alpha_of_one_layers_own_is_that_layers(tmp_path, key):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": {"^to_q": 64, key: 6}})
    )
    got = read(tmp_path, renamed("base_model.model.")).net
    many = [layer for layer in LAYERS if layer.endswith(key.lstrip("^").rstrip("$").replace("\\", ""))]
    expected = ADAPTER | {f"{layer}.lora_B.weight": ADAPTER[f"{layer}.lora_B.weight"] * 3 for layer in many}
    assert LAYER in many and tiny.equal(got, expected)


@pytest.mark.parametrize("pattern", [{"(a+)+$": 1}, {"[": 1}, [1], {"x": "y", LAYER: "z"}])
def test_a_pattern_that_is_no_layers_name_is_refused_and_never_run(tmp_path, pattern):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": pattern}))
    refusal(tmp_path, renamed("base_model.model."))


def test_rank_stabilised_lora_is_divided_by_the_root_of_the_rank(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_rslora": True}))
    got = read(tmp_path, renamed("base_model.model.")).net
    assert torch.equal(got[f"{LAYER}.lora_B.weight"], ADAPTER[f"{LAYER}.lora_B.weight"] * (2 / math.sqrt(2)))


def test_kohyas_convolutions_have_an_alpha_of_their_own(tmp_path):
    flat = formats.kohya_name("mid_block.resnets.0.conv1")
    conv = {f"{flat}.lora_down.weight": torch.ones(4, 8, 3, 3), f"{flat}.lora_up.weight": torch.ones(8, 4, 1, 1)}
    notes = {"ss_network_alpha": "1", "ss_network_args": json.dumps({"conv_dim": "4", "conv_alpha": "3"})}
    got = read(tmp_path, kohya() | conv, notes).net
    assert torch.equal(got["mid_block.resnets.0.conv1.lora_B.weight"], torch.full((8, 4, 1, 1), 3 / 4))
    b = got[f"{LAYER}.lora_B.weight"]
    assert (
        b.shape == (ADAPTER[f"{LAYER}.lora_B.weight"].shape[0], 4)
        and torch.equal(b[:, :2], HALF[f"{LAYER}.lora_B.weight"])
        and not b[:, 2:].any()
    )
    del notes["ss_network_args"]
    assert torch.equal(
        read(tmp_path, conv, notes).net["mid_block.resnets.0.conv1.lora_B.weight"], torch.full((8, 4, 1, 1), 1 / 4)
    )
    assert "conv_alpha" in refusal(tmp_path, conv, notes | {"ss_network_args": '{"conv_dim": "4"}'})


def test_a_layer_without_alpha_among_others_with_one_has_the_rank(tmp_path):
    tensors = kohya(1)
    del tensors[f"{formats.kohya_name(LAYER)}.alpha"]
    got = read(tmp_path, tensors, {"ss_network_alpha": "1"}).net
    assert tiny.equal(got, HALF | {f"{LAYER}.lora_B.weight": ADAPTER[f"{LAYER}.lora_B.weight"]})


@pytest.mark.parametrize("said", ["None", "0", ""])
def test_kohyas_metadata_may_say_that_alpha_is_the_rank(tmp_path, said):
    assert tiny.equal(read(tmp_path, kohya(), {"ss_network_alpha": said}).net, ADAPTER)


def test_layers_of_different_ranks_become_one_rank_with_the_same_products(tmp_path):
    tensors, flat = kohya(1), formats.kohya_name(LAYER)
    wide = {
        f"{flat}.lora_down.weight": torch.randn(5, tensors[f"{flat}.lora_down.weight"].shape[1]),
        f"{flat}.alpha": torch.tensor(10.0),
    }
    wide[f"{flat}.lora_up.weight"] = torch.randn(tensors[f"{flat}.lora_up.weight"].shape[0], 5)
    got = read(tmp_path, tensors | wide).net
    assert {value.shape[0] for key, value in got.items() if "lora_A" in key} == {5}
    for layer in LAYERS:
        a, b, by = (wide[f"{flat}.lora_down.weight"], wide[f"{flat}.lora_up.weight"], 2.0) if layer == LAYER else (
            ADAPTER[f"{layer}.lora_A.weight"], ADAPTER[f"{layer}.lora_B.weight"], 0.5)  # fmt: skip
        torch.testing.assert_close(got[f"{layer}.lora_B.weight"] @ got[f"{layer}.lora_A.weight"], by * (b @ a))


# --- what cannot be carried over --------------------------------------------------------------------------------------

FLAT = formats.kohya_name(LAYER)
STRANGE = {
    "DoRA": f"{FLAT}.dora_scale",
    "a DoRA": f"unet.{LAYER}.lora_magnitude_vector",
    "LoHa": f"{FLAT}.hada_w1_a",
    "LoKr": f"{FLAT}.lokr_w1",
    "three factors": f"{FLAT}.lora_mid.weight",
    "OFT": f"{FLAT}.oft_blocks",
    "IA3": "lora_te_text_model_encoder_layers_0_mlp_fc2.on_input",
    "whole weights": f"{FLAT}.diff",
    "biases": f"unet.{LAYER}.lora_B.bias",
    "embedding": "bundle_emb.rose.string_to_param.*",
    "two text encoders": "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "SDXL's names": "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "transformer": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "no LoRA tensor": "logit_scale",
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_plain_lora_is_refused_by_its_kind(tmp_path, what):
    assert what in refusal(tmp_path, kohya(2) | {STRANGE[what]: torch.ones(2, 2)})


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"fan_in_fan_out": True}, {"peft_type": "LOHA"}, {"modules_to_save": ["conv_in"]}]
)
def test_settings_of_no_plain_lora_are_refused(tmp_path, setting):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2} | setting))
    refusal(tmp_path, renamed("base_model.model."))


def by_peft(start: str | bool) -> tuple[bool, dict]:
    """(whether PEFT changes a layer's own weight when an adapter begins so, the settings that it saves)."""
    net = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 8)})
    before = net["layer"].weight.clone()
    settings = LoraConfig(r=2, lora_alpha=2, target_modules=["layer"], init_lora_weights=start)
    begun = get_peft_model(net, settings).base_model.model["layer"]
    told = settings.to_dict() | {"target_modules": ["layer"]}
    return not torch.equal(begun.base_layer.weight, before), json.loads(json.dumps(told, default=str))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica", "pissa", "pissa_niter_2", "olora"])
def test_a_lora_is_refused_by_its_beginning_exactly_where_peft_changed_the_base_model_with_it(tmp_path, start):
    changed, settings = by_peft(start)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if not changed:
        assert tiny.equal(read(tmp_path, renamed("base_model.model.")).net, ADAPTER)
    else:
        assert f"init_lora_weights is {start}" in refusal(tmp_path, renamed("base_model.model."))
    assert changed == (start in ("pissa", "pissa_niter_2", "olora"))


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "OLoRA"])
def test_a_beginning_with_other_weights_is_refused_in_diffusers_metadata_too(tmp_path, start):
    told = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": start}
    assert start in refusal(tmp_path, renamed("unet."), {"lora_adapter_metadata": json.dumps(told)})


def test_an_alpha_of_nothing_is_refused_since_tools_disagree(tmp_path):
    assert "alpha" in refusal(tmp_path, kohya(0))


@pytest.mark.parametrize("notes", [{"lora_adapter_metadata": "{broken"}, {"ss_network_alpha": "many"}])
def test_notes_that_cannot_be_read_are_refused(tmp_path, notes):
    refusal(tmp_path, kohya(), notes)


def test_one_wide_layer_among_many_narrow_ones_does_not_fill_the_memory(tmp_path):
    tensors = {}
    for number in range(200):
        name = f"unet.mid_block.x{number}"
        tensors |= {
            f"{name}.lora_A.weight": torch.ones(1, 4000, dtype=torch.float16),
            f"{name}.lora_B.weight": torch.ones(4000, 1, dtype=torch.float16),
        }
    wide = {"unet.mid_block.y.lora_A.weight": torch.ones(512, 4), "unet.mid_block.y.lora_B.weight": torch.ones(4, 512)}
    assert "numbers" in refusal(tmp_path, tensors | wide)  # 200 · 512 · 8000 > 2^29


# --- pictures ---------------------------------------------------------------------------------------------------------


def drawn(pipe) -> np.ndarray:
    """float [16, 16, 3] in [0, 1]."""
    seed = torch.Generator().manual_seed(42)
    return pipe(
        "a red poppy", height=16, width=16, num_inference_steps=2, guidance_scale=4.0, generator=seed, output_type="np"
    ).images[0]


@pytest.fixture(scope="module")
def ordinary() -> dict[str, tuple[str, torch.Tensor, torch.Tensor, float]]:
    """A LoRA as kohya's trainer makes them, by file of the base model and layer: A, B and alpha, of several ranks."""
    weights = {part: load_file(tiny.base() / part / model.weights(part)) for part in ("unet", "text_encoder")}
    ends = "attn1.to_q attn2.to_v to_out.0 ff.net.0.proj ff.net.2 proj_in proj_out conv1 conv_shortcut time_emb_proj"
    ends = tuple(f"{ends} conv_in linear_1 downsamplers.0.conv q_proj out_proj fc1".split())
    some, draw = {}, torch.Generator().manual_seed(1)
    for part, tensors in weights.items():
        for key, weight in sorted(tensors.items()):
            if (layer := key.removesuffix(".weight")).endswith(ends) and key.endswith(".weight"):
                rank = 2 + len(some) % 3
                b, a = (
                    torch.randn(weight.shape[0], rank, generator=draw) * 0.2,
                    torch.randn(rank, *weight.shape[1:], generator=draw) * 0.2,
                )
                some[f"{part}.{layer}"] = (a, b[:, :, None, None] if weight.dim() == 4 else b, 1.0 + len(some) % 2)
    return some


@pytest.fixture(scope="module")
def expected(ordinary, tmp_path_factory) -> np.ndarray:
    """The picture of a base model whose weights have alpha/rank · B·A added by hand."""
    base = shutil.copytree(tiny.base(), tmp_path_factory.mktemp("by-hand") / "tiny")
    for part in ("unet", "text_encoder"):
        file = base / part / model.weights(part)
        tensors = load_file(file)
        for name, (a, b, alpha) in ordinary.items():
            if name.startswith(f"{part}."):
                key = f"{name.removeprefix(f'{part}.')}.weight"
                tensors[key] = tensors[key] + alpha / a.shape[0] * (b.flatten(1) @ a.flatten(1)).view(
                    tensors[key].shape
                )
        save_file(tensors, file, metadata={"format": "pt"})
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return drawn(pipe)


@pytest.fixture
def loras(ordinary, tmp_path):
    """That LoRA as kohya's file."""
    tensors = {}
    for name, (a, b, alpha) in ordinary.items():
        part, layer = name.split(".", 1)
        flat = (
            formats.kohya_name(layer)
            if part == "unet"
            else "lora_te_text_model_" + layer.removeprefix("text_model.").replace(".", "_")
        )
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(alpha)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "civ.safetensors")
    return tmp_path / "civ.safetensors"


def test_an_ordinary_lora_draws_what_its_numbers_say(loras, expected):
    pipe = sample.dressed(tiny.base(), lora_files.read(loras), torch.device("cpu"))
    np.testing.assert_allclose(drawn(pipe), expected, atol=1e-4)
    pictures = sample.render(pipe, None, ["a red poppy"], tiny.CONFIG)
    plain = sample.render(sample.plain(tiny.base(), torch.device("cpu")), None, ["a red poppy"], tiny.CONFIG)
    assert pictures[0].tobytes() == plain[0].tobytes() and np.abs(drawn(pipe) - expected).max() > 0.05


def test_merged_into_the_base_it_draws_the_same(loras, expected, tmp_path):
    formats.merge(tiny.base(), lora_files.read(loras), tmp_path / "merged")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(drawn(pipe), expected, atol=1e-3)


def test_the_command_draws_any_of_them_at_every_strength(loras, tmp_path):
    which = sample_.Which(loras, "tiny", tiny.models())
    asked = {"sample-steps": 1, "sample-guidance": 1.0, "resolution": 16, "seed": 1}
    sample_.draw(which, ["a red poppy"], sample_.SWEEP, asked, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("name", ["mid_block.attentions.5.proj_in", "mid_block.resnets.0.norm1", "mid_block"])
def test_layers_that_the_base_model_does_not_have_are_refused_by_name(name):
    beyond = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(AdapterError, match="ADAPTER-01") as caught:
        sample.dressed(tiny.base(), lora_files.LoraFile(ADAPTER | beyond, {}))
    assert name in caught.value.found


def test_a_lora_for_another_width_is_refused():
    wrong = {
        key: value.repeat(1, 2) if key.endswith("attn2.to_k.lora_A.weight") else value for key, value in ADAPTER.items()
    }
    with pytest.raises(AdapterError, match="ADAPTER-01"):
        sample.dressed(tiny.base(), lora_files.LoraFile(wrong, {}))


def test_a_linear_layers_factors_written_as_a_1x1_convolution_are_the_same_numbers():
    like = {f"{LAYER}.lora_A.weight": torch.zeros(2, 8), f"{LAYER}.lora_B.weight": torch.zeros(8, 2)}
    conv = {f"{LAYER}.lora_A.weight": torch.randn(2, 8, 1, 1), f"{LAYER}.lora_B.weight": torch.randn(8, 2, 1, 1)}
    flat = lora_files.shaped(conv, like)
    assert tiny.equal(flat, {key: value[:, :, 0, 0] for key, value in conv.items()}) and tiny.equal(
        lora_files.shaped(flat, conv), conv
    )


def test_what_a_run_could_train_is_told_by_rank_and_layers(tmp_path):
    save_file(renamed("unet."), tmp_path / "flowers.safetensors")
    adapter, config = formats.open_adapter(tmp_path / "flowers.safetensors", "tiny")
    assert tiny.equal(adapter, ADAPTER) and (config.lora_rank, config.lora_targets, config.base_model) == (
        2,
        "attention",
        "tiny",
    )
    assert formats.open_file(tmp_path / "flowers.safetensors")[1] == RunConfig()
