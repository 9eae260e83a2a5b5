"""An independent judge: a small classifier of species, trained on drawn flowers and never on a model's output.

    python -m models.mini.judge            # train, and print its accuracy on drawings it has not seen

Enters: 64×64 RGB pictures. Leaves: a species for each. Training pictures are shifted, mirrored, blurred and grained, so
that the judge looks at shapes rather than at the crispness of a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from models.mini import draw

WEIGHTS = Path(__file__).parent / "judge.safetensors"
SEED = 7


def network() -> nn.Sequential:
    """Four strided convolutions and a linear layer: float [B, 3, 64, 64] in [-1, 1] to [B, 12] logits."""
    layers: list[nn.Module] = []
    for inside, outside in ((3, 24), (24, 48), (48, 72), (72, 96)):
        layers += [nn.Conv2d(inside, outside, 3, stride=2, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 96, len(draw.SPECIES))
    )


def tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    array = np.stack([np.asarray(image.convert("RGB").resize((draw.SIZE, draw.SIZE))) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def drawn(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = draw.photos(draw.SPECIES, count, seed)
    return tensor([image for image, _ in pairs]), torch.arange(count) % len(draw.SPECIES)


def disturb(x: torch.Tensor) -> torch.Tensor:
    """One random mirror, shift, blur, contrast and grain for the batch."""
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    x = torch.roll(x, tuple(torch.randint(-5, 6, (2,)).tolist()), (2, 3))
    if torch.rand(()) < 0.6:  # soft, as an autoencoder's picture is
        small = float(torch.empty(()).uniform_(0.4, 0.9))
        x = F.interpolate(F.interpolate(x, scale_factor=small, mode="bilinear"), size=x.shape[2:], mode="bilinear")
    x = x * float(torch.empty(()).uniform_(0.8, 1.2)) + float(torch.empty(()).uniform_(-0.1, 0.1))
    return x + 0.06 * torch.rand(()) * torch.randn_like(x)


def train(count: int = 9_600, epochs: int = 12, batch: int = 64) -> None:
    torch.manual_seed(SEED)
    (x, y), (new_x, new_y), net = drawn(count, SEED), drawn(1_200, SEED + 1), network()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * (count // batch))
    for epoch in range(epochs):
        net.train()
        for part in torch.randperm(count)[: count // batch * batch].split(batch):
            loss = F.cross_entropy(net(disturb(x[part])), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            right = (net(new_x).argmax(1) == new_y).float().mean()
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.4f}  right on new drawings {right:.4f}", flush=True)
    save_file(net.state_dict(), WEIGHTS)


def judge(images: Sequence[Image.Image]) -> list[str]:
    """The species that the judge sees in each picture."""
    net = network()
    net.load_state_dict(load_file(WEIGHTS))
    with torch.no_grad():
        return [draw.SPECIES[i] for i in net.eval()(tensor(images)).argmax(1).tolist()]


if __name__ == "__main__":
    train()
