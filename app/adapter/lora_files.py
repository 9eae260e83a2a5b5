"""A LoRA file of anybody's, read exactly or refused by name.

Enters: a safetensors file whose tensors are named as PEFT, diffusers (today's and older ones) or kohya's trainer name
them, of a base model of a family. Leaves: `LoraFile`: float32 tensors under PEFT's keys, of the net and, for Stable
Diffusion 1.x and 2.x, of the text encoder, with alpha = rank. Every tensor of the file is used or the file is refused,
before a tensor is read where its header says why. The other families' foreign names (kohya's, BFL's, ai-toolkit's) are
diffusers' to translate (lora_names.py), which is given tensors, never a file. Errors: EXPORT-03.

How strong it is, is taken from where the file says it (`_scale`): from its own alpha tensors; else from diffusers'
metadata in it, or PEFT's adapter_config.json beside it, whatever the file is called; else from kohya's metadata in
it; else alpha is the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from app.adapter import lora_names
from app.adapter.lora_names import ALPHA, A, B, Layers, refused
from app.errors import AdapterError
from app.families import sd
from app.families.base import Family
from app.model import Adapter
from app.rules import MOST_RANK

PEFT, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors names them
WHOLE = ("I64", "I32", "I16", "I8", "U8")  # an alpha may be one of these as well
MOST_BYTES, MOST_NUMBERS, MOST_TENSORS = 2**31, 2**29, 10_000  # of a file; as float32 it is 2 GiB too
MOST_NOTES = 2**26  # bytes of a JSON file beside it; the longest is a run's history
# settings of PEFT's with which it is no plain LoRA
UNLIKE = ("use_dora", "fan_in_fan_out", "layer_replication", "modules_to_save")
# beginnings of init_lora_weights with which PEFT changes the base model's weights before it trains
SUBTRACTED = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraFile(NamedTuple):
    """The adapter of each net, alpha = rank; {} where the file has none of it."""

    net: Adapter
    text: Adapter


def read(path: Path, family: Family = sd.FAMILY, base: Path | None = None) -> LoraFile:
    """What the file holds, for a base model of that family. That it fits is model.apply_adapter's to say.

    base: the base model's folder, where it is known: how SDXL's numbered blocks are grouped is in its settings.
    Errors: EXPORT-03.
    """
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise refused(path, f"it is not there, no file, or larger than {MOST_BYTES >> 20} MiB")
        with safe_open(path, "pt") as file:
            notes, layers, bare = file.metadata() or {}, *_header(path, file, family)
            found = {
                place: {part: file.get_tensor(key) for part, key in parts.items()} for place, parts in layers.items()
            }
        scale = _scale(path, notes, found, bare, family.net)
        if family is not sd.FAMILY:
            found = lora_names.translated(path, layers, found, scale, family, base)
            _check_room(path, {layer: (parts[A].shape, parts[B].shape) for layer, parts in found.items()})
            found = {layer: {A: parts[A].clone(), B: parts[B]} for layer, parts in found.items()}  # one A was many's
            scale = dict.fromkeys(found, 1.0)
        nets: dict[str, Adapter] = {"unet": {}, "text": {}}
        widest = _widest({place: parts[A].shape for place, parts in found.items()})
        for (net, module), parts in found.items():
            nets[net][f"{module}.{A}"] = _padded(parts[A].float(), widest[net], 0)
            nets[net][f"{module}.{B}"] = _padded(parts[B].float() * scale[net, module], widest[net], 1)
    except AdapterError:
        raise
    except Exception as error:  # the file is anybody's, and its readers fail in many ways
        raise refused(path, f"no safetensors file with a LoRA ({type(error).__name__} {error})") from error
    return LoraFile(*({key: nets[net][key].contiguous() for key in sorted(nets[net])} for net in ("unet", "text")))


def begun(adapter: Adapter, fresh: Adapter, scales: Mapping[str, float]) -> Adapter:
    """The adapter (alpha = rank) in the shape of a run's fresh one, with the same effect where each layer counts
    `scales` times.

    A layer it lacks is the fresh one's (B = 0); a rank beyond its own gets the fresh one's A and a B of 0, so that it
    can learn; ranks that are nothing but zeros (`_padded`) go where the run has fewer. What does not fit that way is
    left as it is, for model.check_adapter to refuse. Errors: EXPORT-03 where no layer of it is one of the run's: it is
    another family's, or of other layers.
    """
    if not adapter.keys() & fresh.keys():
        found = f"none of its {len(adapter) // 2} layers is one that this run trains; first: {min(adapter)[:200]}"
        raise AdapterError(
            "EXPORT-03",
            found=found,
            fix="start from a LoRA of this base model's own kind, or give lora-targets with its layers",
        )
    out = dict(fresh) | shaped(adapter, fresh)
    for key in [key for key in adapter if key.endswith(A) and key in fresh]:
        other = key.removesuffix(A) + B
        rank = fresh[key].shape[0]
        if not (out[key][rank:].any() or out[other][:, rank:].any()):
            out |= {key: out[key][:rank], other: out[other][:, :rank]}
        if out[key].dim() != fresh[key].dim() or out[key].shape[0] > rank:
            continue
        a, b = _padded(out[key], rank, 0).clone(), _padded(out[other], rank, 1) / scales[key.removesuffix(f".{A}")]
        dead = (a.flatten(1) == 0).all(1) & (b.transpose(0, 1).flatten(1) == 0).all(1)
        if a.shape == fresh[key].shape:
            a[dead] = fresh[key][dead]
        out |= {key: a.contiguous(), other: b.contiguous()}
    return out


def shaped(adapter: Adapter, like: Adapter) -> Adapter:
    """The adapter with a 1×1 convolution's factors as a linear layer's, or the other way, as `like` has them."""
    out = dict(adapter)
    for key in adapter.keys() & like.keys():
        mine, other = adapter[key].shape, like[key].shape
        if len(mine) != len(other) and all(size == 1 for size in (*mine[2:], *other[2:])):
            out[key] = adapter[key].reshape((*mine[:2], *other[2:]))
    return out


def _padded(factor: torch.Tensor, rank: int, at: int) -> torch.Tensor:
    """With zeros up to the rank along dimension `at`: B·A stays what it is."""
    if (more := rank - factor.shape[at]) <= 0:
        return factor
    shape = list(factor.shape)
    shape[at] = more
    return torch.cat([factor, factor.new_zeros(shape)], at)


# --- its tensors ------------------------------------------------------------------------------------------------------


def _header(path: Path, file: Any, family: Family) -> tuple[Layers, bool]:
    """Each layer's keys by part, and whether some are PEFT's without a net's name. Errors: EXPORT-03."""
    keys, numbers, bare = list(file.keys()), 0, False
    layers: Layers = {}
    if len(keys) > MOST_TENSORS:
        raise refused(path, f"it holds {len(keys)} tensors")
    # a name says best what a file is
    places = [lora_names.place(path, key, family) for key in keys]
    for key, (net, module, part, alone) in zip(keys, places, strict=True):
        bare |= alone
        about = file.get_slice(key)
        shape, kind = about.get_shape(), str(about.get_dtype())
        numbers += (size := math.prod(shape))
        right = kind in TYPES and len(shape) in (2, 4) and size > 0
        if part == ALPHA:
            right = kind in TYPES + WHOLE and size == 1
        if not right or numbers > MOST_NUMBERS:
            raise refused(path, f"{key} is {kind} of shape {shape}")
        if part in layers.setdefault((net, module), {}):
            raise refused(path, f"{key} is there twice, by two names")
        layers[net, module][part] = key
    _ranks(path, file, layers)
    return layers, bare


def _ranks(path: Path, file: Any, layers: Layers) -> None:
    """Errors: EXPORT-03 unless each layer has two halves of one rank, and all of them room at the largest."""
    if not layers or (halves := [module for (_, module), parts in layers.items() if not {A, B} <= parts.keys()]):
        raise refused(path, f"{halves[0]} has only one half" if layers else "it holds no tensors")
    shapes = {
        place: (file.get_slice(parts[A]).get_shape(), file.get_slice(parts[B]).get_shape())
        for place, parts in layers.items()
    }
    for (_, module), (a, b) in shapes.items():
        if a[0] != b[1] or a[0] > MOST_RANK:
            raise refused(path, f"ranks {a[0]} and {b[1]} in {module}, which may have one up to {MOST_RANK}")
    _check_room(path, shapes)


def _check_room(path: Path, shapes: dict[tuple[str, str], Any]) -> None:
    """Errors: EXPORT-03 unless all layers have room with the largest rank among them; from the shapes of A and B."""
    widest = _widest({place: a for place, (a, _) in shapes.items()})
    numbers = sum(widest[net] * (math.prod(a) // a[0] + math.prod(b) // b[1]) for (net, _), (a, b) in shapes.items())
    if numbers > MOST_NUMBERS:
        raise refused(path, f"with rank {max(widest.values())} in every layer it has over {MOST_NUMBERS} numbers")


def _widest(shapes: dict[tuple[str, str], Any]) -> dict[str, int]:
    """The largest rank of each net, from the shapes of the A."""
    nets = {net for net, _ in shapes}
    return {net: max(shape[0] for (owner, _), shape in shapes.items() if owner == net) for net in nets}


# --- its strength -----------------------------------------------------------------------------------------------------


def _scale(
    path: Path, notes: dict[str, str], layers: Layers, bare: bool, net_name: str
) -> dict[tuple[str, str], float]:
    """What to multiply each layer's B by. Errors: EXPORT-03."""
    own, settings = any(ALPHA in parts for parts in layers.values()), _settings(path, notes, bare, net_name)
    scales: dict[tuple[str, str], float] = {}
    ranks: dict[str, set[int]] = {}
    for (net, _), parts in layers.items():
        ranks.setdefault(net, set()).add(parts[A].shape[0])
    for (net, module), parts in layers.items():
        rank = parts[A].shape[0]
        if own:  # a layer without one among others that have it: kohya's trainer and ComfyUI take the rank
            alpha = number(path, parts[ALPHA].item()) if ALPHA in parts else rank
            if alpha == 0:
                raise refused(
                    path, f"the alpha of {module} is 0, which kohya's tools take for the rank and others for nothing"
                )
            scales[net, module] = alpha / rank
        elif said := settings.get(net):
            scales[net, module] = _by_peft(path, said, module, rank, ranks[net])
        else:
            scales[net, module] = (_by_kohya(path, notes, parts[A]) or rank) / rank
    return scales


def _settings(path: Path, notes: dict[str, str], bare: bool, net_name: str) -> dict[str, dict[str, Any]]:
    """PEFT's settings by net: in the file, as diffusers has them, else beside it, as PEFT does. Errors: EXPORT-03."""
    if "lora_adapter_metadata" in notes:
        found = json_object(path, notes["lora_adapter_metadata"])
        prefixes = {"unet": f"{net_name}.", "text": "text_encoder."}
        if not any(key.startswith(tuple(prefixes.values())) for key in found):
            return dict.fromkeys(prefixes, found)
        return {net: {k.removeprefix(p): v for k, v in found.items() if k.startswith(p)} for net, p in prefixes.items()}
    if (bare or path.name == PEFT) and (beside := path.with_name(SETTINGS)).exists():
        return dict.fromkeys(("unet", "text"), json_object(beside))
    return {}


def _by_peft(path: Path, settings: dict[str, Any], module: str, rank: int, ranks: set[int]) -> float:
    """alpha/rank as PEFT has it; a pattern is taken as a module's name or the end of one. Errors: EXPORT-03."""
    if unknown := [key for key in UNLIKE if settings.get(key)]:
        raise refused(path, f"{unknown[0]} is set")
    if str(begun := settings.get("init_lora_weights")).lower().startswith(SUBTRACTED):
        raise refused(path, f"init_lora_weights is {str(begun)[:40]}: it is for a base model that PEFT had changed")
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise refused(path, f"{SETTINGS} is a {str(kind)[:40]}'s")
    patterns = [settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(
        isinstance(pattern, dict) and all(re.fullmatch(r"\^?[\w.\\]+\$?", key) for key in pattern)
        for pattern in patterns
    ):
        raise refused(path, "rank_pattern or alpha_pattern are no names of layers")
    if "r" in settings and settings["r"] not in ranks and not patterns[0]:
        raise refused(
            path,
            f"its settings say rank {str(settings['r'])[:20]}, its tensors {sorted(ranks)[:9]}: are they another's?",
        )
    for key, value in patterns[1].items():
        name = key.replace("\\", "").removesuffix("$")
        if name.removeprefix("^") == module or (not name.startswith("^") and module.endswith(f".{name}")):
            alpha = number(path, value)
            break
    else:
        alpha = number(path, settings.get("lora_alpha", 8))  # PEFT's default
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_kohya(path: Path, notes: dict[str, str], a: torch.Tensor) -> float | None:
    """The alpha in kohya's metadata; None where there is none, or it is the rank. Errors: EXPORT-03."""
    said = notes.get("ss_network_alpha")
    if a.dim() == 4 and a.shape[2:] != (1, 1):
        arguments = json_object(path, notes.get("ss_network_args") or "{}")
        if arguments.get("conv_dim") is not None and (said := arguments.get("conv_alpha")) is None:
            raise refused(path, "its metadata does not say conv_alpha, and no tensor does")
    try:
        return None if said in (None, "None", "") else number(path, float(said)) or None
    except (TypeError, ValueError):
        raise refused(path, f"its metadata says ss_network_alpha = {str(said)[:40]}") from None


def number(path: Path, alpha: object) -> float:
    """An alpha. Errors: EXPORT-03, where it is no number, or none that a tensor can be multiplied by."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -1e6 < alpha < 1e6:
        raise refused(path, f"its alpha is {str(alpha)[:40] if type(alpha) is not int else 'a large number'}")
    return float(alpha)


def json_object(path: Path, said: str | None = None) -> dict[str, Any]:
    """The JSON object in a file, or in a text that stands in it. Errors: EXPORT-03."""
    try:
        if said is None:
            if not path.is_file() or path.stat().st_size > MOST_NOTES:
                raise ValueError(f"no file, or larger than {MOST_NOTES >> 20} MiB")
            said = path.read_text()
        if isinstance(found := json.loads(said), dict):
            return found
        raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise refused(path, f"its JSON cannot be read ({type(error).__name__} {error})") from None
