"""Before/after pictures: the same prompts and seeds under the base model and under each adapter.

Enters: a base model's folder, prompts, and adapters in order. Leaves: PIL images and one labelled grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from app import families, model
from app.adapter.lora_files import LoraFile, shaped
from app.config import RunConfig
from app.errors import HubError
from app.families.base import Family
from app.model import Adapter, Net
from app.settings import read_json, readable

INK, PAPER = (40, 40, 40), (255, 255, 255)
GAP, LINE = 6, 17  # pixels between pictures, and from line to line of a name
BATCH = 8  # pictures at a time
Pipeline = Any  # one of diffusers'
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def device(setting: str) -> torch.device:
    """What HUB_DEVICE names: '' or auto is a GPU where torch sees one, else the CPU. Errors: HOST-15, GPU-02."""
    if setting in ("", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", setting):
        raise HubError("HOST-15", found=f"HUB_DEVICE={setting}", fix="set HUB_DEVICE to auto, cpu or cuda")
    found = torch.device(setting)
    if found.type == "cuda" and (found.index or 0) >= (seen := torch.cuda.device_count()):
        raise HubError(
            "GPU-02",
            found=f"HUB_DEVICE={setting}, and the ServerApp's process sees {seen} GPUs",
            fix="give the hub that GPU (nvidia-smi shows them), or set HUB_DEVICE to cpu or auto",
        )
    return found


def plain(base: Path, on: torch.device | None = None) -> Pipeline:
    """The base model's own pipeline, of the very parts that the training loads; a prompt has as many tokens as a
    caption.

    Errors: MODEL-03, MODEL-05.
    """
    import diffusers

    family = families.check(base)
    parts = {part: model.load(base, part) for part in family.classes}
    for part in (part for part in parts if part.startswith("tokenizer") and not family.large):
        parts[part].model_max_length = family.tokens(base)  # CLIP's alone: a language model's pipeline is told a length
    parts |= family.absent | _scheduler(base)
    kind: Pipeline = getattr(diffusers, family.pipeline)
    with readable(base):
        if "scheduler" in parts:  # all parts are here; from_pretrained would look for the class that cannot be had
            pipe = kind(**parts)
        else:
            pipe = kind.from_pretrained(base, dtype=torch.float32, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(on or device("auto"))


def _scheduler(base: Path) -> dict[str, Any]:
    """In place of the base model's own scheduler where that needs scipy, which is not among the packages, the nearest
    that does not.
    """
    import diffusers

    own = read_json(base / "scheduler" / "scheduler_config.json")
    name = own["_class_name"]  # one that its family knows: the parts are loaded
    instead = "EulerDiscreteScheduler" if name == "LMSDiscreteScheduler" else name  # Euler's is LMS of the first order
    if find_spec("scipy") or not (instead != name or own.get("use_beta_sigmas")):
        return {}
    what = name + (" with use_beta_sigmas" if own.get("use_beta_sigmas") else "")
    print(f"bouquet: without scipy, {what} cannot draw; {instead} with its usual steps does", flush=True)
    return {"scheduler": getattr(diffusers, instead).from_config(own | {"use_beta_sigmas": False})}


def pipeline(base: Path, config: RunConfig, on: torch.device | None = None) -> Pipeline:
    """`plain` with an adapter of the run's shape on its net (B = 0: it draws like the base). Errors: as `plain`."""
    pipe = plain(base, torch.device("cpu"))
    model.add_adapter(net_of(pipe), families.of(base), config)
    net_of(pipe).eval()
    return pipe.to(on or device("auto"))


def dressed(base: Path, file: LoraFile, on: torch.device | None = None) -> Pipeline:
    """`plain` with a LoRA file on its net and its text encoder, every tensor of it, as strong as the file says.

    Errors: as `plain`, ADAPTER-01, ADAPTER-02.
    """
    pipe = plain(base, torch.device("cpu"))
    for net, adapter in ((net_of(pipe), file.net), (pipe.text_encoder, file.text)):
        if adapter:
            model.add_layers(net, adapter)
            wear(net.eval(), adapter)
    return pipe.to(on or device("auto"))


def family_of(pipe: Pipeline) -> Family:
    return families.FAMILIES[type(pipe).__name__]


def net_of(pipe: Pipeline) -> Net:
    """The part of a pipeline that is trained."""
    return getattr(pipe, family_of(pipe).net)


def wear(net: Net, adapter: Adapter | None) -> None:
    """Draw under this adapter from now on, where the net has room for one; None is the base model."""
    if not net._hf_peft_config_loaded:
        return
    if adapter is None:
        net.disable_adapters()
    else:
        net.enable_adapters()
        model.apply_adapter(net, shaped(adapter, model.adapter_of(net)))


def render(
    pipe: Pipeline,
    adapter: Adapter | None,
    prompts: Sequence[str],
    config: RunConfig,
    seed: int | None = None,
    *,
    text: Adapter | None = None,
) -> list[Image.Image]:
    """One picture a prompt; picture i starts from noise seeded by (seed + i), whatever the adapter.

    text: what is on the text encoder, where the pipeline has room for it (`dressed`).
    """
    first, family = config.seed if seed is None else seed, family_of(pipe)
    wear(net_of(pipe), adapter)
    wear(pipe.text_encoder, text)
    side = config.resolution
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = list(prompts[start : start + BATCH])
        images += pipe(
            prompt=part,
            height=side,
            width=side,
            num_inference_steps=config.sample_steps,
            **family.drawing(config),
            generator=[torch.Generator().manual_seed(first + start + i) for i in range(len(part))],
        ).images
    return images


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter at a share of its strength, as `pipe.set_adapters(name, strength)` and `<lora:name:strength>` do."""
    return {key: value * strength if ".lora_B." in key else value for key, value in adapter.items()}


def wrapped(name: str, font: Font, width: int) -> str:
    """The name in lines of at most `width` pixels, after every comma a new one; a single longer word stays whole."""
    lines = []
    for part in name.replace(", ", ",\n").splitlines():
        line = ""
        for word in part.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines.append(line)
    return "\n".join(lines)


def grid(
    rows: Sequence[Sequence[Image.Image]], row_names: Sequence[str], column_names: Sequence[str], cell: int = 128
) -> Image.Image:
    """A sheet of pictures, a name beside each row and above each column; no name comes nearer than 12 to the next."""
    font = ImageFont.load_default(12)
    left = 12 + max(int(font.getlength(name)) for name in row_names)
    heads = [wrapped(name, font, cell + GAP - 12) for name in column_names]
    top = 10 + LINE * max(head.count("\n") + 1 for head in heads)
    sheet = Image.new("RGB", (left + len(heads) * (cell + GAP), top + len(rows) * (cell + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.multiline_text((left + x * (cell + GAP), 4), head, INK, font)
    for y, (name, row) in enumerate(zip(row_names, rows, strict=True)):
        pen.text((6, top + y * (cell + GAP) + cell // 2 - 8), name, INK, font)
        for x, image in enumerate(row):
            resample = Image.Resampling.LANCZOS
            sheet.paste(
                image.convert("RGB").resize((cell, cell), resample), (left + x * (cell + GAP), top + y * (cell + GAP))
            )
    return sheet


def sheet(base: Path, adapters: dict[str, Adapter | None], config: RunConfig) -> Image.Image:
    """A row for each named adapter (None is the base model), a column for each of the run's prompts."""
    pipe = pipeline(base, config)
    rows = [render(pipe, adapter, config.prompts, config) for adapter in adapters.values()]
    return grid(rows, list(adapters), config.prompts, cell=max(128, min(256, config.resolution)))
