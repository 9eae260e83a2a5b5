"""Base models as people have them: trained as what they are, or refused by name before a site is asked."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from app import bases, families, model
from app.adapter import sample
from app.errors import ModelError
from app.families import sd
from app.hub import server_app
from bouquet.site import preflight
from tests.kit import tiny
from tests.kit.memory import Federation


@pytest.fixture
def base(tmp_path) -> Path:
    return shutil.copytree(tiny.base(), tmp_path / "models" / "tiny")


def edit(file: Path, **changes) -> None:
    """None takes a key away."""
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def refused(base: Path, code: str = "MODEL-05", by=families.check) -> ModelError:
    with pytest.raises(ModelError) as caught:
        by(base)
    assert caught.value.code == code, caught.value.report()
    return caught.value


# --- kinds ------------------------------------------------------------------------------------------------------------

INDEX, UNET, VAE, TEXT, SCHEDULE = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
FOREIGN = {  # what people have: (file, changes, what the refusal says)
    "SDXL": (
        INDEX,
        {"_class_name": "StableDiffusionXLPipeline"},
        "text_encoder_2",
    ),
    "SDXL refiner": (INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "StableDiffusionXLImg2ImgPipeline"),
    "SD3": (INDEX, {"_class_name": "StableDiffusion3Pipeline"}, "transformer"),
    "Flux": (INDEX, {"_class_name": "FluxPipeline"}, "transformer"),
    "ControlNet": (INDEX, {"_class_name": "StableDiffusionControlNetPipeline"}, "StableDiffusionControlNetPipeline"),
    "pix2pix": (
        INDEX,
        {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
        "StableDiffusionInstructPix2PixPipeline",
    ),
    "LCM": (INDEX, {"_class_name": "LatentConsistencyModelPipeline"}, "LatentConsistencyModelPipeline"),
    "a pipeline of its own": (INDEX, {"_class_name": ["pipeline", "Mine"]}, "Mine"),
    "no class": (INDEX, {"_class_name": None}, "None"),
    "a second text encoder": (
        INDEX,
        {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        "text_encoder_2",
    ),
    "a ControlNet beside it": (INDEX, {"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
    "another text encoder": (INDEX, {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    "another autoencoder": (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
    "another net": (INDEX, {"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel"),
    "another tokenizer": (INDEX, {"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer"),
    "a net's own class": (
        UNET,
        {"_class_name": "UNetSpatioTemporalConditionModel"},
        "UNetSpatioTemporalConditionModel",
    ),
    "an autoencoder's own class": (VAE, {"_class_name": "ConsistencyDecoderVAE"}, "ConsistencyDecoderVAE"),
    "AltDiffusion": (TEXT, {"model_type": "roberta_series"}, "roberta_series"),
    "inpainting": (UNET, {"in_channels": 9}, "9 channels"),
    "depth": (UNET, {"in_channels": 5}, "5 channels"),
    "learned variance": (UNET, {"out_channels": 8}, "gives 8"),
    "an autoencoder of 16 channels": (VAE, {"latent_channels": 16}, "latents have 16"),
    "another width": (UNET, {"cross_attention_dim": 96}, "width 96"),
    "widths by block": (UNET, {"cross_attention_dim": [16, 32]}, "width [16, 32]"),
    "added conditions": (UNET, {"addition_embed_type": "text_time"}, "addition_embed_type"),
    "noise levels": (UNET, {"num_class_embeds": 1000}, "num_class_embeds"),
    "a picture's embedding": (UNET, {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
    "distilled guidance": (UNET, {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
    "no scaling factor": (VAE, {"scaling_factor": None}, "scaling_factor"),
    "a scaling factor of text": (VAE, {"scaling_factor": "0.18"}, "scaling_factor"),
    "moved latents": (VAE, {"shift_factor": 0.1}, "shift_factor"),
    "flow matching": (SCHEDULE, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "flow sigmas": (SCHEDULE, {"use_flow_sigmas": True}, "flow"),
    "EDM": (SCHEDULE, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    "TCD": (SCHEDULE, {"_class_name": "TCDScheduler"}, "TCDScheduler"),
    "no schedule's class": (SCHEDULE, {"_class_name": None}, "None"),
    "predicting the sample": (SCHEDULE, {"prediction_type": "sample"}, "sample"),
    "predicting the flow": (SCHEDULE, {"prediction_type": "flow_prediction"}, "flow_prediction"),
    "a schedule without betas": (SCHEDULE, {"_class_name": "HeunDiscreteScheduler", "beta_start": None}, "beta_start"),
    "epsilon without any signal": (SCHEDULE, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_base_model_of_another_kind_is_refused_and_the_log_says_what_it_is_and_which_are_known(base, what):
    file, changes, said = FOREIGN[what]
    edit(base / file, **changes)
    error = refused(base)
    assert said in error.found and "Stable Diffusion 1.x" in error.fix and str(base) not in str(error)


@pytest.mark.parametrize("what", ["SDXL", "inpainting", "flow matching", "another width"])
def test_the_hub_refuses_it_before_a_site_is_asked(tmp_path, monkeypatch, base, what):
    file, changes, _ = FOREIGN[what]
    edit(base / file, **changes)
    federation = Federation(tmp_path / "federation")
    federation.fails(monkeypatch, "MODEL-05", models=base.parent)
    assert federation.grid.sent == [] and list(federation.adapters.iterdir()) == []


def test_a_folder_of_other_parts_is_of_another_kind_and_not_damaged(base):
    (base / "unet").rename(base / "transformer")
    edit(base / INDEX, _class_name="FluxPipeline", unet=None, transformer=["diffusers", "FluxTransformer2DModel"])
    assert "text_encoder_2" in refused(base, by=model.fingerprint).found


INSTEAD = {
    "a link that leads nowhere": lambda place: place.symlink_to("/nowhere/sd15"),
    "has no model_index.json": lambda place: place.mkdir(),
    "a checkpoint in one file": lambda place: place.with_name("rose.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("said", INSTEAD)
def test_what_lies_there_and_is_no_base_model_is_told(tmp_path, said):
    INSTEAD[said](tmp_path / "rose")
    with pytest.raises(ModelError, match="MODEL-01") as caught:
        bases.locate("rose", tmp_path)
    assert said in caught.value.found


def test_a_sites_preflight_refuses_it(tmp_path, base):
    edit(base / UNET, in_channels=9)
    settings = preflight.Settings.read(
        {"BOUQUET_MODELS": str(base.parent), "BOUQUET_CACHE": str(tmp_path), "BASE_MODEL": "tiny"}
    )
    line = preflight.Preflight(settings).line("model")
    assert line.state == "fail" and "MODEL-05" in line.text and "9 channels" in line.text


LOADERS = [
    model.load_net,
    partial(model.load, part="vae"),
    partial(model.load, part="text_encoder"),
    lambda base: sample.plain(base, torch.device("cpu")),
]


@pytest.mark.parametrize("load", LOADERS, ids=["unet", "vae", "text encoder", "pictures"])
def test_no_part_of_it_is_loaded_anywhere(base, load):
    edit(base / SCHEDULE, _class_name="FlowMatchEulerDiscreteScheduler")
    refused(base, by=load)


KNOWN = {
    "v-prediction": (SCHEDULE, {"prediction_type": "v_prediction"}),
    "v-prediction that ends without signal": (
        SCHEDULE,
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "no prediction_type, as before 2.0": (SCHEDULE, {"prediction_type": None}),
    "Euler": (SCHEDULE, {"_class_name": "EulerDiscreteScheduler"}),
    "betas one by one": (SCHEDULE, {"trained_betas": [0.001 + 0.00001 * n for n in range(1000)]}),
    "Stable Diffusion's autoencoder without its factor": (
        VAE,
        {"scaling_factor": None, "block_out_channels": sd.SD_VAE},
    ),
    "heads by block": (UNET, {"attention_head_dim": [2, 2]}),
    "a safety checker that is not there": (
        INDEX,
        {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
    ),
}


@pytest.mark.parametrize("what", KNOWN)
def test_what_is_stable_diffusion_is_taken(base, what):
    file, changes = KNOWN[what]
    edit(base / file, **changes)
    families.check(base)
    sd.FAMILY.schedule(base)


@pytest.mark.filterwarnings(
    "ignore:__array_:DeprecationWarning"
)  # diffusers 0.42's with numpy 2, where it makes sigmas
def test_every_kind_of_schedule_that_is_taken_is_one_of_diffusers_and_noises_as_the_one_that_trains(base):
    import diffusers
    from diffusers.utils import is_scipy_available

    for name in set(sd.SCHEDULES) - (set() if is_scipy_available() else {"LMSDiscreteScheduler"}):
        edit(base / SCHEDULE, _class_name=name)
        own = getattr(diffusers, name).from_pretrained(base, subfolder="scheduler")
        ours: Any = sd.FAMILY.schedule(base)
        torch.testing.assert_close(own.alphas_cumprod, ours.scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    "betas", [{"trained_betas": [0.1] * 10}, {"beta_end": float("nan")}, {"beta_start": 2.0}, {"beta_schedule": "mine"}]
)
def test_a_schedule_whose_betas_are_none_is_refused(base, betas):
    edit(base / SCHEDULE, **betas)
    refused(base, "MODEL-03", sd.FAMILY.schedule)
    refused(base, "MODEL-03", model.check)


# --- weights ----------------------------------------------------------------------------------------------------------


def halve(base: Path, *parts: str, keep: bool = False) -> None:
    """The files of `variant="fp16"`, which many people download alone."""
    for part in parts:
        path = base / part / model.weights(part)
        save_file(
            {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()},
            path.with_suffix(".fp16.safetensors"),
            metadata={"format": "pt"},
        )
        if not keep:
            path.unlink()


def test_weights_in_half_precision_alone_are_used_and_counted(base):
    whole = model.fingerprint(base)
    halve(base, "unet", "vae", "text_encoder")
    half = model.fingerprint(base)
    assert {part for part in whole if whole[part] != half[part]} == {"unet", "vae", "text_encoder", "base"}
    for part, load in (
        ("unet", model.load_net),
        ("vae", partial(model.load, part="vae")),
        ("text_encoder", partial(model.load, part="text_encoder")),
    ):
        loaded, original = load(base), load(tiny.base())
        assert all(
            torch.equal(one, other.half().float())
            for one, other in zip(loaded.parameters(), original.parameters(), strict=True)
        ), part
    path = base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({key: value * 2 for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert model.fingerprint(base)["unet"] != half["unet"]


def test_a_part_in_half_precision_beside_others_in_full_is_used_and_a_copy_beside_the_whole_is_not(base):
    halve(base, "vae")
    halve(base, "unet", keep=True)
    assert model.fingerprint(base)["unet"] == model.fingerprint(tiny.base())["unet"]
    assert len(sample.render(sample.plain(base), None, ["a rose"], tiny.CONFIG)) == 1


def test_shards_in_half_precision_are_covered_and_loaded_whole(base):
    for part, kind, size in (("unet", UNet2DConditionModel, "40KB"), ("text_encoder", CLIPTextModel, "20KB")):
        whole = kind.from_pretrained(base / part).half()
        shutil.rmtree(base / part)
        whole.save_pretrained(base / part, max_shard_size=size, variant="fp16")
        assert len(list((base / part).glob("*-of-*"))) > 1
    before = model.fingerprint(base)
    model.load_net(base), model.load(base, "text_encoder")
    shard = min((base / "unet").glob("*-of-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert model.fingerprint(base)["unet"] != before["unet"]
    shard.unlink()
    assert shard.name in refused(base, "MODEL-03", model.fingerprint).found


def test_a_run_on_half_precision_alone_trains(tmp_path, monkeypatch, base):
    halve(base, "unet", "vae", "text_encoder")
    federation = Federation(tmp_path / "federation", rounds=1, local_steps=1)
    for own in federation.own.values():
        own["models-path"] = str(base.parent)
    assert (federation.go(monkeypatch, models=base.parent) / "samples.png").exists()
    assert federation.history()["base"]["fingerprint"] == model.fingerprint(base)["base"]


PARTS = {
    "unet": model.load_net,
    "vae": partial(model.load, part="vae"),
    "text_encoder": partial(model.load, part="text_encoder"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_is_missing_is_never_drawn_at_random(base, part):
    path = base / part / model.weights(part)
    tensors = load_file(path)
    lost = sorted(tensors)[3]
    save_file({key: value for key, value in tensors.items() if key != lost}, path, metadata={"format": "pt"})
    assert lost in refused(base, "MODEL-03", PARTS[part]).found


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_settings_that_leave_weights_out_are_not_its_own(base, part):
    path = base / part / model.weights(part)
    save_file(load_file(path) | {"up_blocks.9.conv.weight": torch.ones(1)}, path, metadata={"format": "pt"})
    assert "up_blocks.9" in refused(base, "MODEL-03", PARTS[part]).found


def test_a_text_encoder_cut_short_on_purpose_and_one_with_older_names_are_taken(base):
    path = base / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    older = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
    last = {key.replace("layers.0.", "layers.1."): value.clone() for key, value in older.items() if "layers.0." in key}
    save_file(
        older | last | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, path, metadata={"format": "pt"}
    )
    loaded, original = model.load(base, "text_encoder"), model.load(tiny.base(), "text_encoder")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), original.parameters(), strict=True))


def test_an_autoencoder_with_the_names_of_older_versions_is_whole(base):
    path = base / "vae" / model.weights("vae")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    older = {}
    for key, value in load_file(path).items():
        for new, old in names.items():
            key = key.replace(new, old) if ".attentions." in key else key
        older[key] = value
    assert any(".query." in key for key in older)
    save_file(older, path, metadata={"format": "pt"})
    loaded, original = model.load(base, "vae"), model.load(tiny.base(), "vae")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_numbers_are_refused(base, part):
    path = base / part / model.weights(part)
    tensors = load_file(path)
    tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert "not finite" in refused(base, "MODEL-03", PARTS[part]).found


def test_a_unet_of_other_settings_than_its_weights_is_refused(base):
    edit(base / UNET, block_out_channels=[8, 32])
    refused(base, "MODEL-03", model.load_net)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_hub_finds_what_only_sites_would_load(tmp_path, monkeypatch, base, part):
    path = base / part / model.weights(part)
    tensors = load_file(path)
    del tensors[min(tensors)]
    save_file(tensors, path, metadata={"format": "pt"})
    federation = Federation(tmp_path / "federation", sample_prompts="")
    federation.fails(monkeypatch, "MODEL-03", models=base.parent)
    assert federation.grid.sent == []


def test_a_tokenizer_with_more_words_than_its_text_encoder_is_refused(base):
    settings = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    more = {
        "id": 949,
        "content": "<rose>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    (base / "tokenizer" / "tokenizer.json").write_text(
        json.dumps(settings | {"added_tokens": [*settings["added_tokens"], more]})
    )
    assert "words" in refused(base, "MODEL-03", model.check).found


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 77, 12])
def test_a_prompt_is_read_to_as_many_tokens_as_a_caption(base, length):
    edit(base / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    pipe = sample.plain(base, torch.device("cpu"))
    text = pipe.encode_prompt("a red poppy", torch.device("cpu"), 1, False)[0]
    assert text.shape[1] == families.of(base).tokens(base) == (12 if length == 12 else 24)
    sample.render(pipe, None, ["a red poppy"], tiny.CONFIG)


# --- what a person reads ----------------------------------------------------------------------------------------------


def test_a_named_error_ends_the_run_without_a_traceback_and_another_with_one(caplog):
    log = logging.getLogger("flwr")
    assert log is server_app.logging.getLogger("flwr")

    def fail(error: Exception) -> str:
        caplog.clear()
        try:
            try:
                raise OSError("no route to the hub")
            except OSError as cause:
                raise error from cause
        except Exception as raised:
            log.error("%s raised an exception", "ServerApp", exc_info=raised)  # as Flower's run_serverapp does
        return caplog.text

    log.addHandler(caplog.handler)
    try:
        named = fail(ModelError("MODEL-02", found="/private", fix="copy it"))
        assert "ServerApp raised an exception" in named and "Traceback" not in named and "no route" not in named
        assert "Traceback" in fail(ValueError("unforeseen"))
    finally:
        log.removeHandler(caplog.handler)


def test_the_report_comes_before_the_run_ends_with_its_public_sentence(tmp_path, monkeypatch, capsys):
    federation = Federation(tmp_path, base_model="stable-diffusion-v1-5")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no route"))
    )
    error = federation.fails(monkeypatch, "MODEL-02")
    out = capsys.readouterr().out
    assert (
        str(error) == "MODEL-02  The base model is not on this machine."
        and "\n  found  no folder" in out
        and "  fix    put the model" in out
    )
