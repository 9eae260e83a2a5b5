"""What a model family is: what differs between Stable Diffusion and Flux, and nothing else.

Enters: a base model's folder in diffusers' layout, its loaded parts, captions, pixels, latents. Leaves: the reasons why
it cannot be trained, latents, a caption's conditions, a prediction, a noise schedule. A family is one file beside this
one with one class below `Family` and `FAMILY`, an instance of it; everything else (the cache, the loop, the wire, the
guard, the pictures) asks it and knows none by name.

Shapes: pixels_BCHW float32 in [-1, 1]; latents_BChw; a caption's conditions are a dict of tensors without a batch
dimension, of which "text" [T, D] may have another T for another caption; conditions of a batch have B in front, "text"
padded with zeros to its longest, and "mask" [B, T], true where a token is, which stays on the host. "size" [B, 6],
long, tells height and width of the photo before it was scaled, top and left of the crop, height and width of the
result, in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from app import text
from app.config import RunConfig
from app.errors import ConfigError
from app.families.noise import Betas, Flow, Schedule
from app.settings import length, read_json, readable

Conditions = dict[str, Tensor]
Settings = dict[str, dict[str, Any]]  # a part's config.json by the part's name
OPTIONAL = {
    "safety_checker",
    "feature_extractor",
    "image_encoder",
}  # parts that a folder may have and nothing here loads
KINDS = {  # `model_type` in the config of a text encoder, by the class that loads it
    "CLIPTextModel": ("clip_text_model", "clip"),
    "CLIPTextModelWithProjection": ("clip_text_model", "clip"),
    "T5EncoderModel": ("t5",),
    "Qwen3Model": ("qwen3",),
    "Qwen3ForCausalLM": ("qwen3",),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl",),
}
ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")


class Repository(NamedTuple):
    """Where a base model is fetched from: Hugging Face's name and revision. Of a gated one each site has to accept the
    licence there first.
    """

    name: str
    revision: str
    licence: str
    gated: bool = False


class Family:
    """The defaults are those of most; a family overrides what is otherwise with it."""

    pipeline: ClassVar[str]  # the class in diffusers, as model_index.json names it
    label: ClassVar[str]  # what people call it
    net: ClassVar[str] = "transformer"  # the part that is trained: its folder, its prefix in files, its attribute
    classes: ClassVar[dict[str, tuple[str, ...]]]  # part: the classes that it may be of; in the fingerprint's order
    repositories: ClassVar[dict[str, Repository]] = {}  # base-model names that are fetched
    options: ClassVar[dict[str, Any]] = {}  # settings in model_index.json that change what is drawn, and their defaults
    targets: ClassVar[dict[str, tuple[str, ...]]] = {"attention": ATTENTION}  # layers by `lora-targets`
    multiple: ClassVar[int] = 16  # of which a picture's side must be one
    kept: ClassVar[torch.dtype] = torch.bfloat16  # in which a caption's conditions are kept on disk
    absent: ClassVar[dict[str, Any]] = {}  # what the pipeline is made without: its arguments by name
    large: ClassVar[bool] = True  # billions of numbers: the hub reads its shapes alone, and text is encoded in 16 bits
    kohya: ClassVar[bool] = False  # whether tools that read kohya's names need them

    # --- which folders ------------------------------------------------------------------------------------------------

    def settings(self, folder: Path) -> Settings:
        """Errors: MODEL-03."""
        own = {part: read_json(folder / part / "config.json") for part in self.classes if not _words(part)}
        return own | {"scheduler": read_json(folder / "scheduler" / "scheduler_config.json")}

    def reasons(self, folder: Path, index: dict[str, Any]) -> Iterator[str]:
        """Why it cannot be trained here, best first; none where it can. What its index (model_index.json) says comes
        first: a folder of other parts is of another kind, and not damaged. Errors: MODEL-03.
        """
        yield from self._named(index)
        own = self.settings(folder)
        yield from self._classes(own)
        yield from self.misfits(own)

    def misfits(self, own: Settings) -> Iterator[str]:
        """Why a base model with these settings cannot be trained as one of this family."""
        raise NotImplementedError

    def _named(self, index: dict[str, Any]) -> Iterator[str]:
        """What is of another class, or there besides: model_index.json has a pair [library, class] a part."""
        named = {
            part: pair[1]
            for part, pair in index.items()
            if isinstance(pair, list) and len(pair) == 2 and pair[1] is not None and type(pair[1]) is not bool
        }
        for part, wanted in self.classes.items():
            if str(named.get(part)).removesuffix("Fast") not in wanted:
                yield f"its {part} is {text.line(named.get(part), 60)}, not {wanted[0]}"
        for part in sorted(named.keys() - self.classes.keys() - OPTIONAL - {"scheduler"}):
            yield f"it has a part {text.line(part, 40)} ({text.line(named[part], 60)})"

    def _classes(self, own: Settings) -> Iterator[str]:
        """Parts whose own settings are another class's."""
        for part in (part for part in self.classes if part in (self.net, "vae")):
            if (name := own[part].get("_class_name")) not in self.classes[part]:
                yield f"{part}/config.json is of {text.line(name, 60)}, not {self.classes[part][0]}"
        for part in (part for part in self.classes if part.startswith("text_encoder")):
            if (kind := own[part].get("model_type")) not in KINDS[self.classes[part][0]]:
                yield f"its {part} is a {text.line(kind, 60)}, not one for {self.classes[part][0]}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What is loaded of a folder, in the fingerprint's order."""
        return (*self.classes, "scheduler")

    @property
    def reads(self) -> torch.dtype:
        """The type in which a text encoder is loaded where only its settings and its wholeness matter."""
        return torch.bfloat16 if self.large else torch.float32

    @property
    def words(self) -> tuple[str, ...]:
        """The parts that read captions: text encoders and their tokenizers."""
        return tuple(part for part in self.classes if part.startswith(("text_encoder", "tokenizer")))

    def check_run(self, config: RunConfig) -> None:
        """Errors: CONFIG-05 where a run asks of this family what it does not have."""
        for wrong, found, fix in self._contradictions(config):
            if wrong:
                raise ConfigError("CONFIG-05", family=self.label, found=found, fix=fix)

    def _contradictions(self, config: RunConfig) -> Iterator[tuple[bool, str, str]]:
        known = ", ".join(self.targets)
        yield (
            config.lora_targets not in self.targets,
            f"lora-targets = {config.lora_targets!r}, which {self.label} does not have",
            f"choose one of: {known}",
        )
        for side in config.sides:
            yield (
                side % self.multiple > 0,
                f"resolution = {side}, and a side of {self.label} is a multiple of {self.multiple}",
                f"choose {-(-side // self.multiple) * self.multiple}",
            )

    # --- encoding, once -----------------------------------------------------------------------------------------------

    def latents(self, vae: Any, pixels_BCHW: Tensor) -> Tensor:
        """Latents as the net knows them: the posterior's mean, moved and scaled as the autoencoder's settings say."""
        z: Tensor = vae.encode(pixels_BCHW).latent_dist.mean
        if shift := vae.config.get("shift_factor"):
            z = z - shift
        scale: float = vae.config.scaling_factor
        return z * scale

    def tokens(self, folder: Path) -> int:
        """Of a caption, padded or cut. Errors: MODEL-03."""
        raise NotImplementedError

    @property
    def reader(self) -> str:
        """The tokenizer that reads furthest: a caption that is cut for it is cut."""
        return [part for part in self.words if part.startswith("tokenizer")][-1]

    def room(self, tokenizer: Any, tokens: int) -> int:
        """Of these tokens, those that a caption itself can have: a template may stand before it."""
        return tokens

    def text(self, parts: Mapping[str, Any], captions: list[str], tokens: int) -> list[Conditions]:
        """Each caption's conditions, by the loaded `words`; most by the pipeline's own `encode_prompt`."""
        raise NotImplementedError

    def encoder(self, parts: Mapping[str, Any]) -> Any:
        """The family's pipeline with the parts that read captions alone, for its `encode_prompt`."""
        import diffusers

        absent = {part: None for part in self.parts if part not in parts}
        return getattr(diffusers, self.pipeline)(**absent, **parts)

    # --- each step ----------------------------------------------------------------------------------------------------

    def schedule(self, folder: Path) -> Schedule:
        """The base model's noise. Errors: MODEL-03."""
        raise NotImplementedError

    def predict(self, net: Any, noisy_BChw: Tensor, told_B: Tensor, given: Conditions) -> Tensor:
        """The net's prediction, in the latents' shape: packing, ids, added conditions and signs are in here."""
        raise NotImplementedError

    def shapes(self, own: Settings, tokens: int) -> dict[str, tuple[int, ...]]:
        """Of one caption's conditions, for an estimate without any weights."""
        raise NotImplementedError

    # --- pictures -----------------------------------------------------------------------------------------------------

    def drawing(self, config: RunConfig) -> dict[str, Any]:
        """What the pipeline is called with beside prompt, size, steps and generator."""
        return {"guidance_scale": config.sample_guidance}

    # --- files --------------------------------------------------------------------------------------------------------

    def notes(self, config: RunConfig, adapter: Mapping[str, Tensor]) -> dict[str, str]:
        """What an adapter's files say of the base model that it is for: the architecture by the name that Stability's
        ModelSpec has for it, and the version by kohya's. Nothing where they have none, or it cannot be told.
        """
        return {}


class FlowFamily(Family):
    """What all families of flow matching have in common."""

    longest: ClassVar[int]  # tokens of a caption: what lies beyond is not read, in training and in pictures alike

    def tokens(self, folder: Path) -> int:
        return self.longest

    def drawing(self, config: RunConfig) -> dict[str, Any]:
        return super().drawing(config) | {"max_sequence_length": self.longest}

    def schedule(self, folder: Path) -> Schedule:
        from diffusers import FlowMatchEulerDiscreteScheduler

        with readable(folder / "scheduler" / "scheduler_config.json"):
            kind: Any = FlowMatchEulerDiscreteScheduler  # its from_pretrained has no types
            table = kind.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
            sigmas, timesteps = table.sigmas[: len(table.timesteps)].float(), table.timesteps.float()
            slope = _slope(table.config)
            falling = (sigmas.diff() < 0).all() and sigmas.isfinite().all() and sigmas[-1] > 0 and sigmas[0] <= 1
            if not falling or not 1 < len(sigmas) <= 100_000:
                raise ValueError("its noise levels do not fall from at most 1 to more than 0")
        return Flow(sigmas, timesteps, slope)

    def misfits(self, own: Settings) -> Iterator[str]:
        schedule = own["scheduler"]
        if (name := schedule.get("_class_name")) != "FlowMatchEulerDiscreteScheduler":
            yield f"its noise schedule is {text.line(name, 60)}, not FlowMatchEulerDiscreteScheduler"
        for key in ("invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas"):
            if schedule.get(key):
                yield f"its noise schedule has {key}"
        yield from self.unlike(own)

    def unlike(self, own: Settings) -> Iterator[str]:
        """As `misfits`, of the net, the autoencoder and the text encoders."""
        raise NotImplementedError

    def _contradictions(self, config: RunConfig) -> Iterator[tuple[bool, str, str]]:
        yield from super()._contradictions(config)
        yield (
            config.min_snr_gamma > 0,
            f"min-snr-gamma = {config.min_snr_gamma:g}, which belongs to noise by betas; {self.label} matches flows",
            "leave it at 0",
        )
        yield (
            config.noise_offset > 0,
            f"noise-offset = {config.noise_offset:g}; the flow of {self.label} ends in noise alone and needs none",
            "leave it at 0",
        )


def before(tokenizer: Any) -> int:
    """Tokens of a chat's template that stand before the caption."""
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(told.partition("\0")[0]).input_ids)


def differs(own: Settings, *, net: str, channels: str, factor: int, width: str, widths: object) -> Iterator[str]:
    """What a transformer, its autoencoder and its text encoders cannot agree on.

    channels: the net's key for what it takes, `factor` times the autoencoder's latent channels; width: its key for the
    text's width, which the encoders make `widths` of.
    """
    takes, has = own[net].get(channels), own["vae"].get("latent_channels", own["vae"].get("z_dim"))
    if type(has) is not int or takes != factor * has:
        takes, has = text.line(takes, 20), text.line(has, 20)
        yield f"the {net} takes {takes} channels, and the autoencoder's latents have {has}, times {factor}"
    if (heard := own[net].get(width)) != widths:
        heard, made = text.line(heard, 40), text.line(widths, 40)
        yield f"the {net} listens to a text of width {heard}, and the text encoder's is {made}"


def stacked(rows: list[Conditions]) -> Conditions:
    """Conditions of a batch from those of its captions: B in front, "text" padded with zeros, and "mask"."""
    counts = [len(row["text"]) for row in rows]
    most = max(counts)
    padded = [torch.nn.functional.pad(row["text"], (0, 0, 0, most - len(row["text"]))) for row in rows]
    others = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "text"}
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    return {"text": torch.stack(padded), "mask": mask, **others}


def text_tokens(folder: Path, encoder: str, tokenizer: str, most: int = 77) -> int:
    """The tokenizer's `model_max_length`, and at most as many as the text encoder has positions for (`most` where it
    names none). Errors: MODEL-03.
    """
    config = read_json(folder / encoder / "config.json")
    words = read_json(folder / tokenizer / "tokenizer_config.json")
    inner = config.get("text_config")
    positions = length((inner if isinstance(inner, dict) else config).get("max_position_embeddings")) or most
    return min(positions, length(words.get("model_max_length")) or positions)


def text_width(encoder: dict[str, Any], key: str = "hidden_size", default: int = 512) -> Any:
    """The width of what a text encoder says."""
    inner = encoder.get("text_config")
    return (inner if isinstance(inner, dict) else encoder).get(key, default)


def betas(folder: Path) -> Schedule:
    """The base model's noise schedule as a DDPMScheduler (training needs no other). Errors: MODEL-03."""
    from diffusers import DDPMScheduler

    settings, kind = folder / "scheduler" / "scheduler_config.json", cast(Any, DDPMScheduler)
    with readable(settings):
        steps = read_json(settings).get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= 100_000:
            raise ValueError("num_train_timesteps is no number from 1 to 100000")
        scheduler = kind.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
        signal = scheduler.alphas_cumprod
        if len(signal) != steps or not (signal.isfinite() & (signal >= 0) & (signal < 1)).all():
            raise ValueError(f"{len(signal)} betas for {steps} timesteps, or betas that are none")
    return Betas(scheduler)


def _slope(scheduler: Mapping[str, Any]) -> float:
    """How much a picture's token more moves the shift's logarithm, where the family's pipeline shifts by the size."""
    if not scheduler["use_dynamic_shifting"] or scheduler["time_shift_type"] != "exponential":
        return 0.0
    low, high = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    slope = float((scheduler["max_shift"] - scheduler["base_shift"]) / (high - low)) if high != low else math.nan
    if not math.isfinite(slope):
        raise ValueError("its shift by the picture's size is no number")
    return slope


def _words(part: str) -> bool:
    return part.startswith("tokenizer")
