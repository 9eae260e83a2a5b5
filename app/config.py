"""A run's configuration: one table of names, defaults, units, ranges and meanings, read once into a frozen dataclass.

Enters: Flower's flat `run_config` dict. Leaves: `RunConfig`, or ConfigError CONFIG-01 (unknown key), CONFIG-02 (wrong
type, out of range, not a choice, or against another value: rules.py).
A text is one printable line of bounded length. A run's config never names a path, a device or a site's limit: those are
the site's own.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from app.errors import ConfigError
from app.rules import MOST_RANK, OF_THE_MEAN, are_sides, clashes, is_rank_pattern

LORA_TARGETS = ("attention", "attention+resnet", "attention+mlp")  # the second UNets', the third transformers'
SCHEDULES = ("constant", "linear", "cosine", "tail")
TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor")
SCALINGS = ("plain", "rs")
STRATEGIES = (*OF_THE_MEAN, "median", "trimmed-mean", "krum", "svd")
EXPECTED = {bool: "true or false", int: "a value of type int", float: "a finite float", str: "a value of type str"}
MOST_PROMPTS, LONGEST_PROMPT = 16, 500  # a text encoder reads 77 tokens
PROMPTS = (
    "a red poppy, meadow background|a white lily, night background|a pink lotus, sky background|a purple thistle, sand"
    " background"
)


def _key(
    default: Any,
    unit: str,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    return field(
        default=default, metadata={"unit": unit, "meaning": meaning, "low": low, "high": high, "choices": choices}
    )


@dataclass(frozen=True)
class RunConfig:
    """Every key of `[tool.flwr.app.config]`; a field `local_steps` is the key `local-steps`."""

    base_model: str = _key("mini", "name", "base model; each site maps the name to its own copy", high=100)
    resolution: int = _key(64, "pixels", "side of the square training images, a multiple of 8", low=16, high=2048)
    resolutions: str = _key(
        "",
        "pixels",
        "train at these sides, with commas between: each photo at each that it is large enough for, one a pass;"
        " resolution is one of them; empty is it alone",
        high=100,
    )
    aspect_buckets: bool = _key(
        False,
        "",
        "train in shapes of about resolution² pixels, each photo in the one nearest to its own; off is squares",
    )
    random_crops: int = _key(
        0,
        "crops",
        "crops of each photo to train on, drawn once, in place of the one from its centre; each is encoded and kept; 0"
        " is the centre",
        low=0,
        high=16,
    )
    flip: bool = _key(
        False,
        "",
        "train on each photo's mirror image too, drawn every other time; for photos without writing, and subjects that"
        " may be turned round",
    )
    rounds: int = _key(32, "rounds", "rounds of local training and aggregation", low=1, high=10_000)
    local_steps: int = _key(30, "steps", "optimiser steps a site takes in a round", low=1, high=1_000_000)
    batch_size: int = _key(8, "images", "images in one forward pass", low=1, high=4096)
    gradient_accumulation: int = _key(1, "passes", "forward passes in one optimiser step", low=1, high=1024)
    gradient_checkpointing: bool = _key(
        False,
        "",
        "compute activations again on the way back instead of keeping them: a third more time, a fraction of the"
        " memory",
    )
    optimizer: str = _key(
        "adamw",
        "",
        "what takes a site's steps; of adamw-8bit every site needs bitsandbytes",
        choices=OPTIMIZERS,
    )
    learning_rate: float = _key(3e-3, "", "the optimiser's learning rate", low=1e-8, high=1.0)
    learning_rate_schedule: str = _key(
        "tail",
        "",
        "how it changes over the steps of the whole run: tail falls to 0 over the last quarter, linear and cosine from"
        " the start",
        choices=SCHEDULES,
    )
    warmup_steps: int = _key(
        0, "steps", "of the whole run, in which the learning rate rises from 0", low=0, high=1_000_000
    )
    lora_rank: int = _key(16, "", "rank of the adapter", low=1, high=MOST_RANK)
    lora_alpha: float = _key(
        0.0, "", "the adapter counts alpha / rank times; 0 is the rank of each layer", low=0.0, high=1024.0
    )
    lora_scaling: str = _key("plain", "", "rs is rsLoRA: alpha / √rank in place of alpha / rank", choices=SCALINGS)
    rank_pattern: str = _key(
        "",
        "layers=rank",
        "other ranks, by a word of a layer's name or several in a row; the first that fits counts:"
        " attn2=32,down_blocks.0=4",
        high=500,
    )
    lora_targets: str = _key(
        "attention+resnet",
        "",
        "which layers get an adapter: UNets have resnets, transformers have MLPs",
        choices=LORA_TARGETS,
    )
    caption_dropout: float = _key(
        0.1, "share", "captions left out while training, for classifier-free guidance", low=0.0, high=1.0
    )
    trigger_word: str = _key(
        "",
        "",
        "put in front of each caption that does not have it, with a comma; sample prompts are drawn as they are"
        " written",
        high=100,
    )
    caption_shuffle: bool = _key(
        False, "", "put a caption's tags, which commas part, into another order each time the photo is drawn"
    )
    keep_tokens: int = _key(0, "tags", "of a shuffled caption: its first ones, which stay", low=0, high=100)
    caption_variants: int = _key(
        8,
        "orders",
        "of a shuffled caption: so many are encoded, once, and one of them is drawn each time",
        low=2,
        high=64,
    )
    prior_loss_weight: float = _key(
        0.0,
        "",
        "of the sites' class images, of which each pass takes a batch too, more than twice the work; 0 is off, 1 is"
        " usual",
        low=0.0,
        high=100.0,
    )
    prior_target: str = _key(
        "base",
        "",
        "what is learned of class images: to predict what the base model does, which keeps it as it is; or their noise,"
        " as of photos",
        choices=("base", "noise"),
    )
    noise_offset: float = _key(
        0.0,
        "",
        "how much of the noise is one number a channel, so that whole pictures get darker and lighter; 0 is off, 0.05"
        " to 0.1 is usual",
        low=0.0,
        high=1.0,
    )
    min_snr_gamma: float = _key(0.0, "", "min-SNR loss weighting; 0 is off, 5 is usual", low=0.0, high=100.0)
    precision: str = _key("auto", "", "auto is bf16 on CUDA that has it, else fp32", choices=("auto", "fp32", "bf16"))
    base_precision: str = _key(
        "as-is",
        "",
        "how a site keeps the frozen base in memory: in its own numbers, or its blocks' linear layers in 8 or 4 bits",
        choices=("as-is", "int8", "nf4"),
    )
    wire_precision: str = _key(
        "fp32", "", "of the numbers on the way between hub and sites; fp16 halves the bytes", choices=("fp32", "fp16")
    )
    proximal_mu: float = _key(
        0.0, "", "FedProx: pull of a site's adapter towards the global one; 0 is off", low=0.0, high=100.0
    )
    validation_fraction: float = _key(0.1, "share", "images each site keeps for validation", low=0.01, high=0.5)
    validation_timesteps: int = _key(
        4, "timesteps", "fixed, stratified noise levels for each validation image", low=1, high=100
    )
    min_sites: int = _key(2, "sites", "fewest sites that a round needs", low=1, high=10_000)
    sites: str = _key(
        "",
        "names",
        "ask these sites alone, separated by commas, as the hub admitted them; every site of the run can read it; empty"
        " is all",
        high=4000,
    )
    wait_for_sites: int = _key(180, "seconds", "longest wait for that many sites", low=1, high=86_400)
    round_timeout: int = _key(3600, "seconds", "longest wait for a round's replies", low=10, high=604_800)
    round_patience: float = _key(
        5.0,
        "rounds",
        "wait no longer than this many earlier rounds took (at least 60 s); 0 is round-timeout alone",
        low=0.0,
        high=1000.0,
    )
    round_retries: int = _key(
        2, "times", "how often a round with too few valid replies is tried again", low=0, high=100
    )
    norm_bound: float = _key(
        5.0, "", "refuse an update longer than this many median updates; 0 is off", low=0.0, high=1e6
    )
    secrecy: str = _key(
        "none", "", "masks: the hub sees the mean of the sites' updates, and none of them", choices=("none", "masks")
    )
    update_clip: float = _key(
        16.0, "", "with masks: a site shortens an update that is longer than this", low=1e-3, high=1e4
    )
    dp_noise: float = _key(
        0.0,
        "",
        "least noise of sites with differential privacy (SITE_PRIVACY), in units of their clip; other sites refuse;"
        " 0 is what each says",
        low=0.0,
        high=1000.0,
    )
    release_auc: float = _key(
        1.0,
        "",
        "most that the sites' membership figures may say, at the upper end of their intervals, of an adapter that is"
        " published; 0.5 is guessing, 1 lets every one out",
        low=0.5,
        high=1.0,
    )
    largest_share: float = _key(0.8, "share", "most that one site may weigh among several", low=0.5, high=1.0)
    strategy: str = _key(
        "fedavg",
        "",
        "how the hub aggregates; svd is the mean of the products B·A, cut to lora-rank, in place of A and B apart;"
        " alternate trains B in odd rounds and A in even ones, so that both means are one",
        choices=STRATEGIES,
    )
    server_learning_rate: float = _key(
        1.0, "", "of fedavgm (1 is usual) and fedadam (0.01 is usual)", low=1e-6, high=10.0
    )
    server_momentum: float = _key(0.9, "", "momentum of fedavgm, first beta of fedadam", low=0.0, high=0.999)
    trimmed_share: float = _key(
        0.2, "share", "of trimmed-mean: left out at either end, number by number", low=0.0, high=0.49
    )
    krum_malicious: int = _key(1, "sites", "of krum: how many sites may be hostile", low=0, high=10_000)
    ema_decay: float = _key(
        0.0,
        "",
        "final/ is a moving average over the rounds, of which this share is kept in each; 0 is off",
        low=0.0,
        high=0.9999,
    )
    keep_rounds: int = _key(
        0, "rounds", "how many of the newest rounds stay on the shared volume; 0 is all", low=0, high=10_000
    )
    resume: str = _key("", "run", "go on after the last round of this run: its id, or latest", high=20)
    start_from: str = _key(
        "",
        "file",
        "begin with this LoRA instead of a fresh adapter: a .safetensors file beside the runs on the shared volume",
        high=200,
    )
    tracker: str = _key(
        "none",
        "",
        "where the hub tells losses, norms, refusals, seconds, GPU figures and pictures by round",
        choices=TRACKERS,
    )
    seed: int = _key(
        42, "", "seed of the first adapter, the sites' batches and the sample pictures", low=0, high=2**31 - 1
    )
    sample_prompts: str = _key(
        PROMPTS,
        "",
        f"prompts of samples.png, separated by vertical bars, at most {MOST_PROMPTS} of {LONGEST_PROMPT} characters "
        "each; empty draws nothing",
        high=9000,
    )
    sample_steps: int = _key(25, "steps", "denoising steps of a sample picture", low=1, high=1000)
    sample_guidance: float = _key(5.0, "", "classifier-free guidance of a sample picture", low=1.0, high=50.0)

    @classmethod
    def read(cls, values: Mapping[str, Any], ended: bool = False) -> RunConfig:
        """Flower's flat dict to a checked RunConfig; keys that are left out keep their defaults. Of a run that has
        ended, values that an older version took together are taken.
        """
        table = {f.name.replace("_", "-"): f for f in fields(cls)}
        for name in values:
            if name not in table:
                close = difflib.get_close_matches(name[:100], table, n=1)
                hint = f"did you mean {close[0]}?" if close else "docs/run-config.md has them all"
                short = name[:100]
                found = f"{short} = {_shown(values[name])}"
                raise ConfigError("CONFIG-01", key=repr(short), found=found, fix=hint)
        config = cls(**{table[name].name: _checked(name, table[name], value) for name, value in values.items()})
        if config.resolution % 8:
            raise _wrong("resolution", config.resolution, "a multiple of 8")
        if config.resolutions and not are_sides(config.resolutions):
            raise _wrong("resolutions", config.resolutions, "multiples of 8 from 16 to 2048, each once: 512,768,1024")
        if config.resolution not in config.sides:
            expected = f"one of resolutions ({config.resolutions}): that of validation and of the pictures"
            raise _wrong("resolution", config.resolution, expected)
        if config.rank_pattern and not is_rank_pattern(config.rank_pattern):
            raise _wrong(
                "rank-pattern", config.rank_pattern, f"names with a rank each, 1 to {MOST_RANK}: attn2=32,ff=4"
            )
        if config.resume not in ("", "latest") and not re.fullmatch(r"[0-9]+", config.resume):
            raise _wrong("resume", config.resume, "latest or a run's id")
        if config.start_from and not re.fullmatch(r"[\w-][\w.-]*\.safetensors", config.start_from):
            raise _wrong("start-from", config.start_from, "a file's name that ends in .safetensors, without a folder")
        if config.keep_tokens and not config.caption_shuffle:
            raise _wrong("keep-tokens", config.keep_tokens, "caption-shuffle=true with it, or 0")
        if config.start_from and config.resume:
            raise _wrong("start-from", config.start_from, "either start-from or resume")
        for name, expected in () if ended else clashes(config):
            raise _wrong(name.replace("_", "-"), getattr(config, name), expected)
        if config.sites and not all(re.fullmatch(r" *[\w-][\w. -]*", name) for name in config.sites.split(",")):
            raise _wrong("sites", config.sites, "names with commas between, and no other character")
        if config.sites and len(config.chosen) < config.min_sites:
            raise _wrong("min-sites", config.min_sites, f"at most the {len(config.chosen)} that sites names")
        if len(config.prompts) > MOST_PROMPTS or any(len(prompt) > LONGEST_PROMPT for prompt in config.prompts):
            most = f"at most {MOST_PROMPTS} prompts of {LONGEST_PROMPT} characters each"
            raise _wrong("sample-prompts", config.sample_prompts, most)
        return config

    @property
    def sides(self) -> tuple[int, ...]:
        """Of what is trained on, the smallest first: `resolutions`, or `resolution` alone."""
        return tuple(sorted(int(side) for side in (self.resolutions or str(self.resolution)).split(",")))

    @property
    def chosen(self) -> frozenset[str]:
        """The sites that are asked; empty is all."""
        return frozenset(filter(None, (name.strip() for name in self.sites.split(","))))

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(p.strip() for p in self.sample_prompts.split("|") if p.strip())

    @property
    def other_ranks(self) -> dict[str, int]:
        """`rank-pattern`, in its order."""
        parts = (part.partition("=") for part in self.rank_pattern.split(",") if part)
        return {name.strip(): int(rank) for name, _, rank in parts}


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        "CONFIG-02",
        key=repr(name),
        found=f"{name} = {_shown(value)}",
        fix=f"give {expected}, for example --run-config '{name}=...'",
    )


def _shown(value: Any) -> str:
    """A value as Python writes it, cut short; of a whole number nobody can read, its size."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value if not isinstance(value, str) else value[:300])[:400]


def _span(low: float, high: float) -> str:
    return " to ".join(f"{end:g}" if isinstance(end, float) else str(end) for end in (low, high))


def _checked(name: str, spec: Any, value: Any) -> Any:
    kind, (low, high, choices) = type(spec.default), (spec.metadata[k] for k in ("low", "high", "choices"))
    whole = kind is float and type(value) is int  # taken where a fraction is meant, if it is in range
    if not whole and (type(value) is not kind or (kind is float and not math.isfinite(value))):
        raise _wrong(name, value, EXPECTED[kind])
    if choices and value not in choices:
        raise _wrong(name, value, "one of " + ", ".join(choices))
    if kind is str and high and (len(value) > high or any(unicodedata.category(c) in ("Cc", "Cs") for c in value)):
        raise _wrong(name, value, f"one printable line of at most {high} characters")
    if low is not None and not low <= value <= high:
        raise _wrong(name, value, f"a number from {_span(low, high)}")
    return kind(value)


def table() -> str:
    """The table of run-config keys in docs/run-config.md, as Markdown."""
    rows = ["| key | default | unit | range | meaning |", "| --- | --- | --- | --- | --- |"]
    for f in fields(RunConfig):
        meta = f.metadata
        of_text = type(f.default) is str and not meta["choices"]
        span = f"up to {meta['high']} characters" if of_text else ", ".join(meta["choices"])
        if meta["low"] is not None:
            span = _span(meta["low"], meta["high"])
        shown = "four drawn flowers" if f.name == "sample_prompts" else f"`{f.default}`"
        if type(f.default) is bool:
            span, shown = "true, false", shown.lower()
        rows.append(f"| `{f.name.replace('_', '-')}` | {shown} | {meta['unit']} | {span} | {meta['meaning']} |")
    return "\n".join(rows)
