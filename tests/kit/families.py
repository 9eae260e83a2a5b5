"""Every family's pipeline, tiny: a few thousand random weights, tokenizers made in code, nothing fetched.

`base(name)` builds a folder in diffusers' layout once for all tests, from a fixed seed. Pictures are 32 pixels, latents
4×16×16 (Flux.2's 16×8×8). Layers are as few as each architecture allows; names of layers are the real ones.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bouquet import ROOT

SIDE = 32
SETTINGS = {  # of a run, beside tiny.RUN
    "resolution": SIDE, "lora_targets": "attention", "learning_rate": 0.05, "sample_prompts": "a red poppy",
}  # fmt: skip
STABLE_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CHAT = (  # as Qwen's, without thinking
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- what families share ----------------------------------------------------------------------------------------------


def clip_words() -> Any:
    words = transformers.CLIPTokenizer.from_pretrained(ROOT / "models" / "mini" / "tokenizer")
    words.model_max_length = 77
    return words


def t5_words() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_letters + string.digits + ".,"]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_words() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*bytes_to_unicode().values(), *special])}
    words = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[], model_max_length=2048)
    words.add_special_tokens({"additional_special_tokens": special[1:]})
    words.chat_template = CHAT
    return words


def clip(kind: str) -> torch.nn.Module:
    words = clip_words()
    settings = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(settings)


def t5(width: int) -> torch.nn.Module:
    settings = transformers.T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(settings)


def qwen3(kind: str, layers: int) -> torch.nn.Module:
    settings = transformers.Qwen3Config(
        vocab_size=len(qwen_words()), hidden_size=16, intermediate_size=16, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return getattr(transformers, kind)(settings)


def autoencoder(**settings: Any) -> torch.nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **settings,
    )  # fmt: skip


def unet(**settings: Any) -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    )  # fmt: skip


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


# --- the families -----------------------------------------------------------------------------------------------------


def sd(predicts: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        unet=unet(cross_attention_dim=32, attention_head_dim=2), vae=autoencoder(),
        text_encoder=clip("CLIPTextModel"), tokenizer=clip_words(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        scheduler=diffusers.DDIMScheduler(
            **STABLE_BETAS, prediction_type=predicts, clip_sample=False, set_alpha_to_one=False
        ),
    )  # fmt: skip


def sdxl() -> Any:
    net = unet(
        cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        unet=net, vae=autoencoder(), text_encoder=clip("CLIPTextModel"), tokenizer=clip_words(),
        text_encoder_2=clip("CLIPTextModelWithProjection"), tokenizer_2=clip_words(),
        scheduler=diffusers.EulerDiscreteScheduler(**STABLE_BETAS, timestep_spacing="leading"),
    )  # fmt: skip


def sd3() -> Any:
    net = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
        attention_head_dim=8, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, vae=autoencoder(shift_factor=0.06, scaling_factor=1.53), scheduler=flow(shift=3.0),
        text_encoder=clip("CLIPTextModelWithProjection"), tokenizer=clip_words(),
        text_encoder_2=clip("CLIPTextModelWithProjection"), tokenizer_2=clip_words(),
        text_encoder_3=t5(64), tokenizer_3=t5_words(),
    )  # fmt: skip


def flux() -> Any:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=net, vae=autoencoder(shift_factor=0.12, scaling_factor=0.36),
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip("CLIPTextModel"), tokenizer=clip_words(), text_encoder_2=t5(32), tokenizer_2=t5_words(),
    )  # fmt: skip


def flux2() -> Any:
    net = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=SIDE, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean += torch.linspace(-1, 1, 16)
    vae.bn.running_var *= torch.linspace(0.5, 2, 16)
    return diffusers.Flux2KleinPipeline(
        transformer=net, vae=vae, scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen3("Qwen3ForCausalLM", 28), tokenizer=qwen_words(),
    )  # fmt: skip


def zimage() -> Any:
    net = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    with torch.no_grad():  # which it leaves as they were in memory
        net.x_pad_token.fill_(1.0)
        net.cap_pad_token.fill_(1.0)
    return diffusers.ZImagePipeline(
        transformer=net, vae=autoencoder(shift_factor=0.12, scaling_factor=0.36), scheduler=flow(shift=3.0),
        text_encoder=qwen3("Qwen3Model", 3), tokenizer=qwen_words(),
    )  # fmt: skip


def qwen_image() -> Any:
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5],
    )  # fmt: skip
    language = {
        "vocab_size": len(qwen_words()), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1e6,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    settings = transformers.Qwen2_5_VLConfig(text_config=language, vision_config=vision)
    return diffusers.QwenImagePipeline(
        transformer=net, vae=vae, scheduler=flow(use_dynamic_shifting=True), tokenizer=qwen_words(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(settings),
    )  # fmt: skip


ALL: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sd-v": lambda: sd("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "zimage": zimage,
    "qwen-image": qwen_image,
}


@functools.cache
def models() -> Path:
    """A folder of base models, which `base` fills as they are asked for."""
    folder = Path(tempfile.mkdtemp(prefix="bouquet-families-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def base(name: str) -> Path:
    """The folder of this family's base model, `name` below `models()`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = ALL[name]()
    pipe.save_pretrained(models() / name)
    return models() / name
