"""Make the mini base model from drawn flowers: autoencoder, tokenizer, then text encoder and UNet together.

    python -m models.mini.pretrain vae --steps 4500
    python -m models.mini.pretrain unet --steps 9000
    python -m models.mini.pretrain export

Enters: nothing but a seed. Leaves: this folder in the standard diffusers layout (safetensors) and `loss.json`.
Each stage keeps its state in `.work/` and goes on from there when started again.
Sources: Rombach et al. 2022, arXiv:2112.10752 (latent diffusion); Ho and Salimans 2022, arXiv:2207.12598 (guidance).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.mini import draw

HERE = Path(__file__).parent
WORK = HERE / ".work"
SEED = 20261123
PICTURES = 24_000  # drawn once, known species only
SCRIBBLES = 3_000  # pictures of random strokes, so that the autoencoder is not tied to the known species
TOKENS = 24  # longest caption, in tokens
WIDTH = 128  # text width
NAMES = """
alpine anemone anthurium artichoke aster azalea balloon bearded bee bells bird bishop bromelia buttercup californian
camellia canna cape carnation clematis columbine common coneflower crocus cyclamen daffodil dahlia dandelion desert
fire flower foxglove frangipani garden gaura gazania gentian geranium ginger globe grape great hibiscus hippeastrum
holly hyacinth iris japanese king love magnolia mallow marigold mexican mist moon morning glory moss orchid
osteospermum oxeye passion pelargonium petunia phlox pincushion plant poinsettia primrose primula protea sea siam
silverbush snapdragon spear spring stemless sweet sword thorn tiger toad tree trumpet wallflower water watercress wild
windflower photo of the with and two three garden field drawing picture black green brown
""".split()  # noqa: SIM905 - a list would be a line a word


def pictures() -> tuple[np.ndarray, list[str]]:
    """The pre-training set: uint8 [PICTURES, 64, 64, 3] and captions, drawn once and kept in `.work/`."""
    pixels, text = WORK / "pictures.npy", WORK / "captions.json"
    if not text.exists():
        WORK.mkdir(exist_ok=True)
        drawn = draw.photos(draw.KNOWN, PICTURES, SEED)
        np.save(pixels, np.stack([np.asarray(image) for image, _ in drawn]))
        text.write_text(json.dumps([caption for _, caption in drawn]))
    return np.load(pixels, mmap_mode="r"), json.loads(text.read_text())


def scribbles() -> np.ndarray:
    """uint8 [SCRIBBLES, 64, 64, 3]: random petals, strokes and discs on the usual backgrounds."""
    rng = np.random.default_rng(SEED + 1)
    out = []
    for _ in range(SCRIBBLES):
        pen = draw.Pen(str(rng.choice(list(draw.BACKGROUNDS))), str(rng.choice(list(draw.COLOURS))), rng)
        for _ in range(int(rng.integers(4, 14))):
            at, angle = tuple(rng.uniform(4, 60, 2)), rng.uniform(0, 7)
            rgb = tuple(int(v) for v in rng.integers(0, 256, 3))
            match int(rng.integers(3)):
                case 0:
                    pen.petal(
                        at,
                        angle,
                        rng.uniform(6, 26),
                        rng.uniform(3, 14),
                        point=rng.uniform(0.2, 1.3),
                        light=rng.uniform(0.6, 1.1),
                    )
                case 1:
                    pen.line([at, tuple(rng.uniform(4, 60, 2))], rgb, rng.uniform(0.7, 2.5))
                case _:
                    pen.disc(at, rng.uniform(1, 9), rgb)
        out.append(np.asarray(pen.image.reduce(draw.OVER)))
    return np.stack(out)


def floats(batch: np.ndarray) -> torch.Tensor:
    """uint8 BHWC to float32 BCHW in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


class Log:
    """A line every 50 steps, and the same numbers for `loss.json`; `start` is the step that was saved last."""

    def __init__(self, stage: str, every: int = 500) -> None:
        self.path, self.begun, self.recent = WORK / f"{stage}.json", time.time(), []
        rows = json.loads(self.path.read_text()) if self.path.exists() else []
        self.start = rows[-1][0] // every * every if rows else 0
        self.rows = [row for row in rows if row[0] <= self.start]

    def add(self, step: int, steps: int, loss: float) -> None:
        self.recent.append(loss)
        if step % 50 == 0:
            mean, self.recent = sum(self.recent) / len(self.recent), []
            pace = (time.time() - self.begun) / (step - self.start)
            self.rows.append([step, round(mean, 5)])
            self.path.write_text(json.dumps(self.rows))
            print(
                f"step {step}/{steps}  loss {mean:.4f}  {pace:.2f} s a step  ETA {pace * (steps - step) / 60:.0f} min",
                flush=True,
            )


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=draw.SIZE,
    )


def train_vae(steps: int, batch: int = 16, rate: float = 1.2e-3) -> None:
    """L1 + squared error + L1 of image gradients (keeps edges), KL weight 1e-6; sets `scaling_factor` = 1/std of
    latents.
    """
    log, saved = Log("vae"), WORK / "vae"
    torch.manual_seed(SEED + log.start)
    rng = np.random.default_rng(SEED + log.start)
    images = np.concatenate([pictures()[0][:12_000], scribbles()])
    vae = (AutoencoderKL.from_pretrained(saved) if log.start else new_vae()).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps - log.start, pct_start=0.04)
    for step in range(log.start + 1, steps + 1):
        x = floats(images[rng.integers(len(images), size=batch)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        edges = (y.diff(dim=2) - x.diff(dim=2)).abs().mean() + (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
        loss = (y - x).abs().mean() + 2 * F.mse_loss(y, x) + edges + 1e-6 * posterior.kl().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        log.add(step, steps, loss.item())
        if step % 500 == 0 or step == steps:
            save_vae(vae, images, saved)


def save_vae(vae: AutoencoderKL, images: np.ndarray, folder: Path) -> None:
    with torch.no_grad():
        z = vae.encode(floats(images[:512])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    vae.save_pretrained(folder)


def tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's format whose merges cover the captions' and common flowers' words."""
    words = [*NAMES, *draw.SPECIES, *draw.COLOURS, *draw.BACKGROUNDS, "a", "background", "flower"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [" ".join(words)],
        trainers.BpeTrainer(
            vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    vocab = {token: i for i, token in enumerate([*alphabet, *(f"{c}</w>" for c in alphabet)])}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = len(vocab), len(vocab) + 1
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def new_text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    """Two layers. Token embeddings start large, so that a word never trained on still differs from every other word."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=draw.SIZE // 4,
        block_out_channels=(96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule, epsilon prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def latents(vae: AutoencoderKL) -> torch.Tensor:
    """float32 [PICTURES, 4, 16, 16], scaled; encoded once and kept in `.work/`."""
    path = WORK / "latents.safetensors"
    if not path.exists():
        images = pictures()[0]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts = [vae.encode(floats(images[i : i + 64])).latent_dist.mean.float() for i in range(0, len(images), 64)]
        save_file({"latents": (torch.cat(parts) * vae.config.scaling_factor).contiguous()}, path)
    return load_file(path)["latents"]


def train_unet(steps: int, batch: int = 32, rate: float = 1e-3, dropout: float = 0.1) -> None:
    """Noise prediction with caption dropout; text encoder and UNet learn together; the weights' average is kept."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(WORK / "vae").eval().to(memory_format=torch.channels_last)
    tokens, noise = tokenizer(), scheduler()
    x0 = latents(vae)
    ids = tokens(pictures()[1], padding="max_length", truncation=True, return_tensors="pt").input_ids
    blank = tokens([""], padding="max_length", return_tensors="pt").input_ids[0]
    both = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokens)}).to(
        memory_format=torch.channels_last
    )
    print(f"{sum(p.numel() for p in both['unet'].parameters()) / 1e6:.2f} M parameters in the UNet", flush=True)
    optimiser = torch.optim.AdamW(both.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    log, state = Log("unet", every=250), WORK / "unet.safetensors"
    start = log.start
    if start:  # the saved weights are the average
        both.load_state_dict(load_file(state))
    ema = EMAModel(both.parameters(), decay=0.998, update_after_step=0)
    ema.optimization_step = start
    torch.manual_seed(SEED + start)
    for step in range(start + 1, steps + 1):
        for group in optimiser.param_groups:  # warm up, hold, then fall to a tenth over the last fifth
            group["lr"] = rate * min(1, (step - start) / 100, max(0.1, (steps - step) / (0.2 * steps)))
        pick = torch.randint(len(x0), (batch,))
        text = torch.where(torch.rand(batch, 1) < dropout, blank, ids[pick])
        t = torch.randint(noise.config.num_train_timesteps, (batch,))
        eps = torch.randn(batch, *x0.shape[1:])
        noisy = noise.add_noise(x0[pick], eps, t).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = both["text_encoder"](text).last_hidden_state
            predicted = both["unet"](noisy, t, hidden).sample
        loss = F.mse_loss(predicted.float(), eps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        ema.step(both.parameters())
        log.add(step, steps, loss.item())
        if step % 250 == 0 or step == steps:
            ema.store(both.parameters())
            ema.copy_to(both.parameters())
            save_file({key: value.contiguous() for key, value in both.state_dict().items()}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
            ema.restore(both.parameters())


def export() -> None:
    """Write the diffusers layout, and load it back the way a user does."""
    tokens = tokenizer()
    unet, text_encoder = new_unet(), new_text_encoder(tokens)
    weights = torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    weights.load_state_dict(load_file(WORK / "unet.safetensors"))
    StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(WORK / "vae").half(),
        # float32: transformers loads a model in the type it was saved in, diffusers in float32
        text_encoder=text_encoder,
        tokenizer=tokens,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(HERE)
    for path in HERE.glob("*/config.json"):  # says where a part was loaded from: this machine's business
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    curves = {stage: json.loads((WORK / f"{stage}.json").read_text()) for stage in ("vae", "unet")}
    (HERE / "loss.json").write_text(json.dumps({"seed": SEED, "pictures": PICTURES, "step_loss": curves}) + "\n")
    plot(curves)
    StableDiffusionPipeline.from_pretrained(HERE, safety_checker=None)


def plot(curves: dict[str, list[tuple[int, float]]]) -> None:
    """loss.png: a panel for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(9, 3), layout="constrained")
    for panel, (stage, rows) in zip(panels, curves.items(), strict=True):
        panel.plot(*zip(*rows, strict=True))
        panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(HERE / "loss.png", dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "unet", "export"))
    parser.add_argument("--steps", type=int, default=9000)
    asked = parser.parse_args()
    {"vae": lambda: train_vae(asked.steps), "unet": lambda: train_unet(asked.steps), "export": export}[asked.stage]()
