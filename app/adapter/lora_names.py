"""The names that tools give to a LoRA's tensors, for each family of base models.

Enters: a tensor's name and a family; or a file's tensors in the family's foreign names (kohya's, BFL's, ai-toolkit's).
Leaves: which half of which layer it is, under the net's own names. Of Stable Diffusion 1.x and 2.x every name is known
here; the others' foreign names are the family's own pipeline's in diffusers to translate, which is given tensors, never
a file. Errors: EXPORT-03.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from app.errors import AdapterError
from app.families import sd
from app.families.base import Family
from app.settings import read_json

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
DOWN = (
    ".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)  # fmt: skip
ENDS = dict.fromkeys(DOWN, A) | {end.replace("lora_A", "lora_B").replace("down", "up"): B for end in DOWN}
ENDS |= dict.fromkeys((".alpha", "_lora.alpha", ".lora.alpha"), ALPHA)
END = f"({'|'.join(map(re.escape, ENDS))})"
UNET = r"(?:(?:down_blocks|up_blocks|mid_block|time_embedding)\..+?|conv_in|conv_out)"
TEXT = r"(?:text_model\.)?(?:encoder|embeddings)\..+?"
NET = r"(?P<root>base_model\.model\.)?(?P<net>unet\.|diffusion_model\.|text_encoder\.)?"
KEY = re.compile(rf"{NET}(?:(?P<unet>{UNET})|(?P<text>{TEXT})){END}")
KOHYA = re.compile(rf"lora_(?P<net>unet|te)_(?P<flat>\w+){END}")
ANY = re.compile(rf"(?:base_model\.model\.)?(?:(?P<net>unet|transformer)\.)?(?P<module>.+?)(?P<end>{END})")
FOREIGN = re.compile(r"^lora_|^diffusion_model\.|double_blocks|single_blocks|joint_blocks|[._]qkv[._](?!mlp)")
WORDS = re.compile(r"^(?:lora_te|text_encoder|te\d?[._]|t5xxl|clip_|text_model|text_projection)|\.text_model\.")
BLOCKS = ("down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks")
SDXL, SDXL_NAMES, FLUX = (
    "a LoRA for two text encoders, as SDXL has",
    "in SDXL's names",
    "a transformer's, as SD3 and Flux have",
)
OTHERS = {  # what else is found in such files, by a part of a tensor's name; with a dot before it, by the end
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "lora_mid": "a LoCon of three factors",
    "oft_": "an OFT",
    "on_input": "an IA3",
    "bundle_emb": "an embedding in a LoRA",
    ".diff": "whole weights in a LoRA",
    ".diff_b": "whole weights in a LoRA",
    ".bias": "a LoRA with biases",
    "lycoris_": "in LyCORIS' own names",
}
TRANSFORMERS = dict.fromkeys(("transformer.", "single_blocks", "double_blocks"), FLUX)
ELSE = {  # and where Stable Diffusion 1.x or 2.x is meant
    **dict.fromkeys(("lora_te1_", "lora_te2_", "text_encoder_2."), SDXL),
    **dict.fromkeys(("input_blocks", "middle_block", "output_blocks"), SDXL_NAMES),
    **TRANSFORMERS,
}
JOINED = (  # names with an underscore of their own
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "conv_shortcut", "time_emb_proj", "proj_in",
    "proj_out", "conv_in", "conv_out", "time_embedding", "linear_1", "linear_2", "text_model", "self_attn",
    "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip
Layers = dict[tuple[str, str], dict[str, Any]]  # (net, module): its A, B and alpha, as keys or tensors


def place(path: Path, key: str, family: Family) -> tuple[str, str, str, bool]:
    """(net, module, part) of a tensor, and whether its name has no net's before the module's. Errors: EXPORT-03."""
    return _place(path, key) if family is sd.FAMILY else _any_place(path, key, family)


def _place(path: Path, key: str) -> tuple[str, str, str, bool]:
    """`place` of Stable Diffusion 1.x and 2.x."""
    if match := KOHYA.fullmatch(key):
        name, net, end, alone = _dotted(match["flat"]), {"unet": "unet", "te": "text"}[match["net"]], match[3], False
        if not re.fullmatch(UNET if net == "unet" else TEXT, name):
            match = None
    elif match := KEY.fullmatch(key):
        net = "unet" if match["unet"] else "text"
        name, end, alone = (
            match[net],
            match[match.re.groups],
            not match["net"] and bool(re.search(r"\.lora_[AB]\.", key)),
        )
        if match["net"] and (match["net"] == "text_encoder.") != (net == "text"):
            match = None
    if not match:
        kind = _kind(key, OTHERS | ELSE)
        raise refused(
            path, f"it is {kind} ({key})" if kind else f"{key} is no LoRA tensor of the UNet or the text encoder"
        )
    if end.startswith("_lora."):  # an attention processor's, of older versions of diffusers
        name = _of_processor(name) if net == "unet" else re.sub(r"\bto_(q|k|v|out)$", r"\1_proj", name)
    return net, name.removeprefix("text_model.") if net == "text" else name, ENDS[end], alone


def _kind(key: str, kinds: dict[str, str]) -> str:
    """What a tensor's name tells of its file that it should not, or ''."""
    found = (what for mark, what in kinds.items() if (key.endswith(mark) if mark.startswith(".") else mark in key))
    return next(found, "")


def _of_processor(name: str) -> str:
    """A UNet's layer that was named by its attention processor."""
    return re.sub(r"\bto_out$", "to_out.0", name.replace(".processor.", "."))


def _any_place(path: Path, key: str, family: Family) -> tuple[str, str, str, bool]:
    """`place` of the other families: the net's alone, its modules by the file's own names. Errors: EXPORT-03."""
    others = TRANSFORMERS if family.net == "unet" else dict.fromkeys(BLOCKS, "a UNet's, as Stable Diffusion has")
    if kind := _kind(key, OTHERS | others):
        raise refused(path, f"it is {kind} ({key})", family)
    if WORDS.search(key.removeprefix("base_model.model.")):
        raise refused(path, f"beside the net's it has layers of a text encoder, which no run trains ({key})", family)
    if not (match := ANY.fullmatch(key)) or match["net"] not in (None, family.net):
        raise refused(path, f"{key} is no LoRA tensor of {family.label}'s {family.net}", family)
    module, part = match["module"], ENDS[match["end"]]
    return "unet", module, part, not match["net"] and bool(re.search(r"\.lora_[AB]\.", key))


def translated(
    path: Path,
    layers: Layers,
    found: Layers,
    scale: dict[tuple[str, str], float],
    family: Family,
    base: Path | None,
) -> Layers:
    """The layers under the net's own names, B at its strength. Errors: EXPORT-03.

    What a foreign name means is asked of the family's own pipeline, which is told alpha = rank. It may rename, and cut
    B by rows (`qkv`); what it cannot name it drops without a word, or gives back as it was: then rows of B are lost, or
    the name is still foreign.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, parts in found.items():
        keys, rank = layers[layer], parts[A].shape[0]
        tensors |= {keys[A]: parts[A].float(), keys[B]: parts[B].float() * scale[layer]}
        tensors |= {keys[ALPHA]: torch.tensor(float(rank))} if ALPHA in keys else {}
    if any(FOREIGN.search(key.removeprefix("base_model.model.")) for key in tensors):
        tensors = _by_diffusers(path, tensors, family, base)
    out: Layers = {}
    for key, value in tensors.items():
        if (
            not (match := ANY.fullmatch(key))
            or FOREIGN.search(match["module"])
            or match["net"] not in (None, family.net)
        ):
            raise refused(path, f"{key} is no name that diffusers knows of {family.label}'s {family.net}", family)
        module, part = match["module"], ENDS[match["end"]]
        module = _of_processor(module) if match["end"].startswith("_lora.") else module
        if part in out.setdefault(("unet", module), {}):
            raise refused(path, f"{module} is there twice, by two names", family)
        out["unet", module][part] = value
    out = {layer: parts for layer, parts in out.items() if parts.keys() != {ALPHA}}
    rows = [sum(parts[B].shape[0] for parts in those.values() if B in parts) for those in (found, out)]
    if rows[0] != rows[1] or not all({A, B} <= parts.keys() for parts in out.values()):
        lost = f"of {rows[0]} rows of its layers {rows[1]} have a place in {family.label}'s {family.net}"
        raise refused(path, f"{lost}: it has layers that diffusers does not know there, or some twice", family)
    return out


def _by_diffusers(
    path: Path, tensors: dict[str, torch.Tensor], family: Family, base: Path | None
) -> dict[str, torch.Tensor]:
    """Foreign names as diffusers reads them. Errors: EXPORT-03."""
    import diffusers

    if family.pipeline == "FluxPipeline":
        tensors = _as_kohya(tensors)
    how: dict[str, Any] = {}
    if family.net == "unet":
        settings = read_json(base / "unet" / "config.json") if base else {}
        how["unet_config"] = SimpleNamespace(layers_per_block=settings.get("layers_per_block", 2))
    try:
        said = getattr(diffusers, family.pipeline).lora_state_dict(tensors, **how)
    except Exception as error:  # it fails in many ways on what it does not know
        said = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise refused(path, f"diffusers cannot read its names as {family.label}'s ({said})", family) from None
    return dict(said[0] if isinstance(said, tuple) else said)


def _as_kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flux.1's foreign names with kohya's ends and an alpha each: of others diffusers reads whole models alone."""
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        end = next(end for end in ENDS if key.endswith(end))  # each has one, as it was read
        if (part := ENDS[end]) != ALPHA:
            name = key.removesuffix(end).removeprefix("base_model.model.")
            name = re.sub(r"^(?=(?:double|single)_blocks\.)", "diffusion_model.", name)
            out[f"{name}.{'lora_down' if part == A else 'lora_up'}.weight"] = value
            out[f"{name}.alpha"] = torch.tensor(float(value.shape[0 if part == A else 1]))
    return out


def _dotted(flat: str) -> str:
    """Kohya's flat name back to the module's: only these words have an underscore of their own."""
    name = re.sub(r"\bto\.(q|k|v|out)\b", r"to_\1", flat.replace("_", "."))
    for word in JOINED:
        name = re.sub(rf"\b{re.escape(word.replace('_', '.'))}\b", word, name)
    return name


def refused(path: Path, why: str, family: Family = sd.FAMILY) -> AdapterError:
    label = "Stable Diffusion" if family is sd.FAMILY else family.label
    fix = f"give a safetensors file with a plain LoRA of {label} (docs/models.md lists what can be read)"
    return AdapterError("EXPORT-03", found=f"{path}: {why[:500]}", fix=fix)
