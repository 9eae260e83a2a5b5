"""The base model by name and fingerprint, and the adapter on its UNet."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from app import bases, model
from app.adapter import sample
from app.config import RunConfig
from app.errors import AdapterError, ModelError
from app.families import sd
from app.site import cache
from tests.kit import tiny


def refused(code: str, adapter: model.Adapter) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        model.check_adapter(adapter, tiny.fresh())
    assert caught.value.code == code
    return caught.value


# --- the base model --------------------------------------------------------------------------------------------------


def test_a_name_is_a_folder_among_the_base_models():
    assert bases.locate("tiny", tiny.models()) == tiny.models() / "tiny"


@pytest.mark.parametrize("name", ["rose", "", ".", "..", "../tiny", "tiny/unet", "/tiny"])
def test_a_name_that_is_not_a_base_model_is_refused_with_the_known_ones(name):
    with pytest.raises(ModelError) as caught:
        bases.locate(name, tiny.models())
    assert caught.value.code == "MODEL-01"
    assert all(name in caught.value.found for name in ("stable-diffusion-v1-5, ", "z-image", "tiny"))


def test_a_known_model_that_cannot_be_fetched_is_refused_with_the_folder_it_could_lie_in(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError) as caught:
        bases.locate("stable-diffusion-v1-5", tmp_path)
    assert caught.value.code == "MODEL-02"
    assert str(tmp_path / "stable-diffusion-v1-5") in caught.value.fix
    assert str(tmp_path) not in str(caught.value)  # str() goes to the hub


def test_a_known_model_is_fetched_at_its_pinned_revision_and_without_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(repository, *, revision, allow_patterns, ignore_patterns):
        asked.update(repository=repository, revision=revision, allow=allow_patterns, ignore=ignore_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert bases.locate("stable-diffusion-v1-5", tmp_path) == tmp_path
    assert asked["repository"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert len(asked["revision"]) == 40
    assert "safety_checker/*" not in asked["allow"] and "*.bin" in asked["ignore"]


def copy(tmp_path):
    return shutil.copytree(tiny.base(), tmp_path / "copy")


def test_a_copy_has_the_same_fingerprint(tmp_path):
    assert model.fingerprint(copy(tmp_path)) == model.fingerprint(tiny.base())


def test_a_parts_fingerprint_is_the_sha256_of_its_names_and_file_hashes():
    by_hand = hashlib.sha256()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        by_hand.update(name.encode() + hashlib.sha256((tiny.base() / "vae" / name).read_bytes()).digest())
    assert model.fingerprint(tiny.base())["vae"] == by_hand.hexdigest()


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("scheduler", "scheduler_config.json"),
        ("tokenizer", "tokenizer.json"),
    ],
)
def test_one_changed_byte_changes_its_part_and_the_whole_and_no_other_part(tmp_path, part, file):
    folder = copy(tmp_path)
    path = folder / part / file
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1", b"2", 1) if path.suffix == ".json" else data[:-1] + b" ")
    before, after = model.fingerprint(tiny.base()), model.fingerprint(folder)
    assert {key for key in before if before[key] != after[key]} == {part, "base"}


def test_a_missing_part_is_refused_by_name(tmp_path):
    folder = copy(tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ModelError, match="MODEL-03") as caught:
        model.fingerprint(folder)
    assert "vae/" in caught.value.found


def test_remembered_sums_are_used_again_and_a_changed_file_is_read_again(tmp_path, monkeypatch):
    folder, memory = copy(tmp_path), tmp_path / "memory"
    first = model.fingerprint(folder, memory)
    read, add_up = [], model._sum
    monkeypatch.setattr(model, "_sum", lambda files: read.extend(files) or add_up(files))
    assert model.fingerprint(folder, memory) == first and read == []
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert model.fingerprint(folder, memory)["base"] != first["base"]
    assert read == [folder / "scheduler" / "scheduler_config.json"]


WEIGHTS = {part: tiny.base() / part / model.weights(part) for part in ("unet", "vae", "text_encoder")}


def turn_into_pickle(folder, part: str, more: float = 0.0) -> None:
    """What repositories of old hold: the same numbers as .bin, and no safetensors."""
    path = folder / part / WEIGHTS[part].name
    tensors = {key: value + more for key, value in load_file(path).items()}
    path.unlink()
    torch.save(
        tensors, path.parent / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin")
    )


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_part_without_safetensors_is_refused_by_name_whatever_else_it_has(tmp_path, part):
    folder = copy(tmp_path)
    turn_into_pickle(folder, part)
    with pytest.raises(ModelError, match="MODEL-03") as caught:
        model.fingerprint(folder)
    assert str(folder / part) in caught.value.found and "safetensors" in caught.value.found


@pytest.mark.parametrize(
    ("part", "load"),
    [
        ("unet", model.load_net),
        ("vae", partial(model.load, part="vae")),
        ("text_encoder", lambda folder: cache._encode_captions(["a rose"], folder, torch.device("cpu"))),
        ("unet", lambda folder: sample.pipeline(folder, tiny.CONFIG)),
        ("text_encoder", lambda folder: sample.pipeline(folder, tiny.CONFIG)),
    ],
)
def test_no_pickle_is_loaded(tmp_path, part, load):
    folder = copy(tmp_path)
    turn_into_pickle(folder, part, more=0.01)
    with pytest.raises(ModelError, match="MODEL-03"):
        load(folder)


def test_a_weights_file_that_is_a_pointer_is_refused_by_name(tmp_path):
    folder = copy(tmp_path)
    (folder / "vae" / WEIGHTS["vae"].name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(ModelError, match="MODEL-03") as caught:
        model.fingerprint(folder)
    assert "vae" in caught.value.found


def test_a_text_encoder_that_brings_an_adapter_from_elsewhere_is_refused(tmp_path):
    folder = copy(tmp_path)
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ModelError, match="MODEL-03") as caught:
        model.fingerprint(folder)
    assert "adapter" in caught.value.found


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "diffusion_pytorch_model.bin",
    ],
)
def test_copies_of_the_weights_that_are_not_loaded_do_not_count(tmp_path, name):
    folder = copy(tmp_path)
    (folder / "unet" / name).write_bytes(b"the same in half precision")
    assert model.fingerprint(folder) == model.fingerprint(tiny.base())


def test_lines_that_end_as_windows_ends_them_do_not_count(tmp_path):
    folder, changed = copy(tmp_path), 0
    for path in folder.glob("*/*.json"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\n", b"\r\n"))
        changed += path.read_bytes() != data
    assert changed >= 4 and model.fingerprint(folder) == model.fingerprint(tiny.base())


def shards(folder) -> list:
    """The UNet as two files and their index, as diffusers writes a large one."""
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(tiny.base(), subfolder="unet").save_pretrained(
        folder / "new", max_shard_size="40KB"
    )
    shutil.rmtree(folder / "unet")
    (folder / "new").rename(folder / "unet")
    return sorted((folder / "unet").glob("*-of-*.safetensors"))


def test_weights_in_shards_are_covered_whole(tmp_path):
    folder = copy(tmp_path)
    files = [
        folder / "unet" / "config.json",
        *shards(folder),
        folder / "unet" / "diffusion_pytorch_model.safetensors.index.json",
    ]
    by_hand = hashlib.sha256()
    for path in files:
        by_hand.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    before = model.fingerprint(folder)
    assert len(files) >= 4 and before["unet"] == by_hand.hexdigest()
    for path in files[1:-1]:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert model.fingerprint(folder)["unet"] != before["unet"]
        path.write_bytes(data)
    model.load_net(folder)


def test_a_shard_that_is_missing_or_lies_elsewhere_is_refused(tmp_path):
    folder = copy(tmp_path)
    shard, index = shards(folder)[0], folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    for name in ("../vae/diffusion_pytorch_model.safetensors", str(tiny.base()), "weights.bin", 3, None, []):
        index.write_text(json.dumps(good | {"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(ModelError, match="MODEL-03"):
            model.fingerprint(folder)
    index.write_text(json.dumps(good))
    shard.unlink()
    with pytest.raises(ModelError, match="MODEL-03") as caught:
        model.fingerprint(folder)
    assert shard.name in caught.value.found


def test_a_plain_base_models_fingerprint_is_of_its_parts_alone_as_it_always_was():
    sums = model.fingerprint(tiny.base())
    assert sums["base"] == hashlib.sha256("".join(sums[part] for part in sd.FAMILY.parts).encode()).hexdigest()
    assert (  # what sites wrote in the first weeks
        model.fingerprint(tiny.ROOT / "models" / "mini")["base"]
        == "c805a30ac87b54ce89f4edd19c1613452ce338ffa36afcbd18bb314d6ebd7e90"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("scheduler", ["diffusers", "EulerDiscreteScheduler"]),
    ],
)
def test_what_the_index_says_of_the_parts_counts(tmp_path, key, value):
    folder = copy(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {key: value}))
    before, after = model.fingerprint(tiny.base()), model.fingerprint(folder)
    assert {name for name in before if before[name] != after[name]} == {"base"}


def test_a_fingerprint_from_before_copies_were_left_out_is_still_known(tmp_path):
    folder = copy(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    by_hand = ""
    for part in sd.FAMILY.parts:  # every .safetensors, .json and .txt file, by name
        total = hashlib.sha256()
        for path in sorted((folder / part).iterdir()):
            total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        by_hand += total.hexdigest()
    former, today = hashlib.sha256(by_hand.encode()).hexdigest(), model.fingerprint(folder)["base"]
    assert former != today
    assert model.is_base(folder, today, today) and model.is_base(folder, today, former)
    assert not model.is_base(folder, today, "0" * 64) and not model.is_base(tiny.base(), today, former)


def test_a_file_exchanged_for_one_of_its_size_and_time_is_read_again(tmp_path):
    folder, memory = copy(tmp_path), tmp_path / "memory"
    path = folder / "unet" / WEIGHTS["unet"].name
    first, times, data = model.fingerprint(folder, memory), path.stat().st_mtime_ns, path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(times, times))
    assert model.fingerprint(folder, memory)["unet"] != first["unet"]


def test_a_sum_that_an_older_version_remembered_is_not_taken(tmp_path):
    folder, memory = copy(tmp_path), tmp_path / "memory"
    memory.mkdir()
    for part in sd.FAMILY.parts:
        files = sorted(p for p in (folder / part).iterdir())
        seen = repr([(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
        (memory / f"sum-{hashlib.sha256(seen.encode()).hexdigest()[:32]}.json").write_text(json.dumps("0" * 64))
    assert model.fingerprint(folder, memory) == model.fingerprint(tiny.base())


# --- the adapter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["attention", "attention+resnet"])
def test_exactly_the_lora_parameters_are_trainable_and_they_are_float32(dtype, targets):
    unet = tiny.unet(tiny.config(lora_targets=targets), dtype)
    trainable = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in unet.named_parameters() if not p.requires_grad}
    assert trainable and all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert not any("lora" in name for name in frozen)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in frozen.values()} == {dtype}


def test_training_on_a_bf16_base_gives_finite_float32_gradients_to_the_adapter_alone():
    unet = tiny.unet(dtype=torch.bfloat16)
    latents, text = tiny.batch(2)
    unet(latents.bfloat16(), torch.tensor([10, 500]), text.bfloat16()).sample.float().square().mean().backward()
    assert {name for name, p in unet.named_parameters() if p.grad is not None} == {
        name for name, p in unet.named_parameters() if "lora" in name
    }
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None
    )


def test_attention_has_four_layers_an_attention_block_and_two_matrices_a_layer():
    # 4 attention blocks (1 down, 1 middle, 2 up), each self- and cross-attention, 4 layers each, A and B: 4·2·4·2
    assert len(tiny.fresh(tiny.config(lora_targets="attention"))) == 4 * 2 * 4 * 2


def test_a_linear_layers_matrices_have_the_rank_between_its_input_and_output():
    adapter = tiny.fresh(tiny.config(lora_rank=3))
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert adapter[f"{key}.lora_A.weight"].shape == (3, 16)  # from the text's 16 features
    assert adapter[f"{key}.lora_B.weight"].shape == (16, 3)


def test_the_scale_is_one_because_alpha_is_the_rank():
    layer = tiny.unet().mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.scaling == {"default": 1.0}


def test_a_fresh_adapter_draws_like_the_base_and_another_does_not():
    latents, text = tiny.batch(2)
    at = torch.tensor([10, 500])
    plain = model.load_net(tiny.base())(latents, at, text).sample
    unet = tiny.unet()
    assert torch.equal(unet(latents, at, text).sample, plain)
    model.apply_adapter(unet, tiny.adapter(1))
    assert (unet(latents, at, text).sample - plain).abs().max() > 1e-3


def test_the_seed_alone_decides_the_first_adapter():
    torch.manual_seed(99)
    again = model.new_adapter(tiny.base(), tiny.CONFIG)
    assert tiny.equal(again, tiny.fresh())
    other = model.new_adapter(tiny.base(), tiny.config(seed=43))
    assert not torch.equal(
        other["mid_block.resnets.0.conv1.lora_A.weight"], again["mid_block.resnets.0.conv1.lora_A.weight"]
    )


def test_adding_an_adapter_leaves_the_processes_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.unet()
    assert torch.equal(torch.rand(3), expected)


def test_what_is_applied_is_read_back_bit_for_bit_and_its_hash_is_echoed():
    unet, adapter = tiny.unet(), tiny.adapter(1)
    assert model.apply_adapter(unet, adapter) == model.adapter_hash(adapter)
    assert tiny.equal(model.adapter_of(unet), adapter)


def test_applying_keeps_the_adapter_trainable():
    unet = tiny.unet()
    model.apply_adapter(unet, tiny.adapter(1))
    assert all(p.requires_grad == ("lora" in name) for name, p in unet.named_parameters())


def test_the_adapter_is_a_copy_that_training_does_not_change():
    unet = tiny.unet()
    kept = model.adapter_of(unet)
    before = {key: value.clone() for key, value in kept.items()}
    for parameter in unet.parameters():
        parameter.data.add_(1)
    assert tiny.equal(kept, before)


def test_keys_with_the_adapters_name_in_them_are_refused():
    # PEFT's state dict has `…lora_A.weight`, a module's has `…lora_A.default.weight`: neither may pass for the other.
    unet = tiny.unet()
    named = {name: p.detach() for name, p in unet.named_parameters() if "lora" in name}
    assert all(".default." in key for key in named) and len(named) == len(tiny.fresh())
    with pytest.raises(AdapterError, match="ADAPTER-01") as caught:
        model.apply_adapter(unet, named)
    assert f"{len(named)} keys missing, {len(named)} extra" in caught.value.found


def test_a_missing_key_is_refused_by_name():
    adapter = tiny.adapter(1)
    key = sorted(adapter)[7]
    del adapter[key]
    assert refused("ADAPTER-01", adapter).found == f"1 keys missing, 0 extra, 0 of another shape or type; first: {key}"


def test_an_extra_key_is_refused_by_name():
    found = refused("ADAPTER-01", tiny.adapter(1) | {"conv_in.lora_A.weight": torch.zeros(1)}).found
    assert found == "0 keys missing, 1 extra, 0 of another shape or type; first: conv_in.lora_A.weight"


@pytest.mark.parametrize(
    "spoil", [lambda v: v.T, lambda v: v[:1], lambda v: torch.ones(1), lambda v: v.double(), lambda v: v.half()]
)
def test_another_shape_or_type_is_refused_by_name_even_where_it_would_broadcast(spoil):
    adapter = tiny.adapter(1)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    adapter[key] = spoil(adapter[key])
    assert refused("ADAPTER-01", adapter).found == f"0 keys missing, 0 extra, 1 of another shape or type; first: {key}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_refused_by_name(value):
    adapter = tiny.adapter(1)
    key = sorted(adapter)[-1]
    adapter[key].view(-1)[-1] = value
    assert refused("ADAPTER-02", adapter).found == f"NaN or infinity in 1 of {len(adapter)} tensors; first: {key}"


def test_a_refused_adapter_leaves_the_one_before_in_place():
    unet, good = tiny.unet(), tiny.adapter(1)
    model.apply_adapter(unet, good)
    with pytest.raises(AdapterError):
        model.apply_adapter(unet, tiny.adapter(2) | {"extra": torch.zeros(1)})
    assert tiny.equal(model.adapter_of(unet), good)


def test_the_hash_is_sha256_over_key_shape_type_and_little_endian_floats():
    adapter = {"b": torch.tensor([[1.5], [-2.0]]), "a": torch.tensor([0.25])}
    text = b"a (1,) torch.float32\n" + np.array([0.25], "<f4").tobytes()
    text += b"b (2, 1) torch.float32\n" + np.array([1.5, -2.0], "<f4").tobytes()
    assert model.adapter_hash(adapter) == hashlib.sha256(text).hexdigest()


def test_the_hash_depends_on_every_number_and_not_on_the_order_of_keys():
    adapter = tiny.adapter(1)
    assert model.adapter_hash(dict(reversed(adapter.items()))) == model.adapter_hash(adapter)
    changed = tiny.adapter(1)
    last = next(iter(changed.values())).view(-1)
    last[-1] = torch.nextafter(last[-1], torch.tensor(9.0))
    assert model.adapter_hash(changed) != model.adapter_hash(adapter)


def test_a_model_without_the_named_layers_is_told_apart_from_one_with_them():
    narrow = tiny.fresh(tiny.config(lora_targets="attention"))
    wide = tiny.fresh(RunConfig.read(tiny.RUN))
    with pytest.raises(AdapterError, match="ADAPTER-01"):
        model.check_adapter(narrow, wide)
