"""Measures of drawn pictures: diversity, the demo's judge, and torchmetrics' KID and CLIP score where they are on this
machine.

Enters: pictures, a list for each prompt. Leaves: numbers. Errors: MEASURE-01 before anything is drawn; nothing is
downloaded.
Sources: KID, Binkowski et al. 2018, arXiv:1801.01401; CLIP score, Hessel et al. 2021, arXiv:2104.08718.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.adapter.sample import Pipeline
from app.errors import BouquetError
from app.site.photos.images import BadImage, rgb, to_pixels

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name; it would fetch the file itself
SUBSETS = 100


def diversity(pipe: Pipeline, rows: Sequence[Sequence[Image.Image]]) -> float:
    """Mean distance between two pictures of one prompt, per number of the autoencoder's latents (root mean square); 0:
    all alike.
    """
    from bouquet.adapter.memorised import latents

    def one(images: Sequence[Image.Image]) -> float:
        rows_ND = latents(pipe, images).double()
        return float((torch.pdist(rows_ND) / rows_ND.shape[1] ** 0.5).mean())

    return statistics.fmean(map(one, rows))


def judged(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> float:
    """The share of pictures in which the demo's judge sees the species that the prompt names. Errors: MEASURE-01."""
    from models.mini.judge import judge

    return statistics.fmean(
        seen == wanted for wanted, images in zip(species(prompts), rows, strict=True) for seen in judge(images)
    )


def species(prompts: Sequence[str]) -> list[str]:
    """What the demo's judge is to see in each prompt's pictures. Errors: MEASURE-01."""
    from models.mini import draw

    named = [[one for one in draw.SPECIES if one in prompt.split(",")[0].split()] for prompt in prompts]
    if not all(named):
        raise _missing(
            "the judge knows the demo's species alone", f"prompts that name one of {', '.join(draw.SPECIES)}"
        )
    return [found[0] for found in named]


def photos(folder: Path, resolution: int) -> tuple[list[Image.Image], int]:
    """(each photo of a folder as training sees one, cut to a square of that many pixels; how many were skipped since
    they cannot be read). Captions are not asked for. Errors: MEASURE-01, SITE-06, SITE-07.
    """
    from app.site.photos import data, folders

    found: dict[str, Image.Image] = {}
    skipped = 0
    for entry in folders.entries(folder.resolve(), template=""):
        if entry.reason in data.LATE:
            continue
        try:
            if entry.reason:
                raise BadImage(entry.reason)
            bytes_of = entry.load()
            found.setdefault(hashlib.sha256(bytes_of).hexdigest(), square(rgb(bytes_of), resolution))
        except BadImage:
            skipped += 1
    if len(found) < 2:
        raise _missing(
            f"{folder} holds {len(found)} photos that can be read, and {skipped} that cannot",
            "name a folder with PNG, JPEG or WebP photos: --photos DIR",
        )
    return list(found.values()), skipped


def square(photo: Image.Image, resolution: int) -> Image.Image:
    """The middle of it, as training sees it."""
    array = to_pixels(photo, resolution).permute(1, 2, 0).numpy()
    return Image.fromarray(((array + 1) * 127.5).round().astype(np.uint8))


def kid(drawn: Sequence[Image.Image], real: Sequence[Image.Image], features: str, seed: int) -> dict[str, float]:
    """Mean and standard deviation over SUBSETS subsets, of 50 pictures or of as many as there are; 0 is alike."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(50, len(drawn), len(real))
    metric = KernelInceptionDistance(
        _judge_features() if features == "judge" else 2048, subsets=SUBSETS, subset_size=size
    )
    metric.update(_pixels(real), real=True)
    metric.update(_pixels(drawn), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return {"mean": mean.item(), "std": deviation.item(), "subset": size}


def clip(prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]], folder: Path) -> float:
    """100 × the mean cosine between picture and prompt, not below 0."""
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Plain(CLIPModel):  # type: ignore[misc]
        """With the bare features that torchmetrics 1.9 asks for; transformers 5 wraps them."""

        def get_image_features(self, *args: Any, **more: Any) -> Any:
            return super().get_image_features(*args, **more).pooler_output

        def get_text_features(self, *args: Any, **more: Any) -> Any:
            return super().get_text_features(*args, **more).pooler_output

    def load() -> tuple[Any, Any]:  # by name torchmetrics would fetch
        clip: Any = Plain.from_pretrained(folder, local_files_only=True)
        return clip.eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True)

    metric = CLIPScore(load)
    for prompt, images in zip(prompts, rows, strict=True):
        metric.update(list(_pixels(images)), [prompt] * len(images))
    return float(metric.compute())


def need_kid(features: str) -> None:
    _need("torchmetrics")
    if features == "inception":
        _need("torch_fidelity")
        if not (weights := Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION).is_file():
            raise _missing(f"no {weights}", "put the file there, or take the demo's judge: --kid judge")


def need_clip(folder: Path) -> None:
    _need("torchmetrics")
    if not (folder / "config.json").is_file():
        raise _missing(f"{folder} holds no config.json", "name the folder of a CLIP model: --clip DIR")


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise _missing(
            f"the package {package} is not installed",
            f"pip install {package.replace('_', '-')}, or leave this measure out",
        )


def _missing(found: str, fix: str) -> BouquetError:
    return BouquetError("MEASURE-01", found=found, fix=fix)


def _pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def _judge_features() -> torch.nn.Module:
    """The judge without its last layer: uint8 [N, 3, H, W] to float [N, 384]."""
    from safetensors.torch import load_file

    from models.mini import judge

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = judge.network()
            net.load_state_dict(load_file(judge.WEIGHTS))
            self.net = net[:-1].eval()

        def forward(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
            images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels_N3HW]
            with torch.no_grad():
                features: torch.Tensor = self.net(judge.tensor(images))
            return features

    return Features().eval()
