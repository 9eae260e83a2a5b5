"""The base model's fingerprint, its parts, and the adapter on its net.

Enters: a base model's folder (bases.py). Leaves: its parts, each loaded whole or not at all; a frozen net with a
trainable LoRA adapter, and the adapter as a plain dict of float32 tensors under PEFT's keys (`….lora_A.weight`),
applied strictly and hashed. Which parts there are, which of them is the net and which of its layers get an adapter is
the family's to say (families/). Errors: MODEL-03 (incomplete or damaged), MODEL-05 (families'), ADAPTER-01 (does not
fit), ADAPTER-02 (not finite).

The fingerprint is of what is loaded: of weights that is safetensors alone, never a pickle, and a copy in half precision
(`….fp16.safetensors`) only where a part has no other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from app import families, lora
from app.config import RunConfig
from app.errors import AdapterError
from app.families.base import Family
from app.files import write_json
from app.settings import incomplete, read_json, read_text, readable

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}  # by library
HALF = "fp16"  # as the files of a copy in half precision are named, which is all that many people download
TEXTS = {".json", ".txt", ".jinja", ".model"}  # of a tokenizer; the last is sentencepiece's table
Adapter = dict[str, Tensor]
Net = Any  # a part's torch.nn.Module, with what diffusers, transformers and PEFT give it beside that


def fingerprint(folder: Path, memory: Path | None = None) -> dict[str, str]:
    """SHA-256 by part ('unet', 'vae', …) over names and bytes of what is loaded of it, and of all parts ('base').

    `memory` is a folder in which the sums are remembered by each file's place, size and times, so that gigabytes are
    read once. Errors: MODEL-03.
    """
    family = families.of(folder)
    sums = {part: _remembered(_files(folder, part), memory) for part in family.parts}
    index, scheduler = read_json(folder / "model_index.json"), read_json(folder / "scheduler" / "scheduler_config.json")
    plain = {"_class_name": family.pipeline, "scheduler": ["diffusers", scheduler.get("_class_name")]}
    plain |= {part: [library(part), kinds[0]] for part, kinds in family.classes.items()} | family.options
    said = {key: index.get(key, family.options.get(key)) for key in plain}
    other = json.dumps(said, sort_keys=True) if said != plain else ""  # so a plain one's is of its parts alone
    sums["base"] = hashlib.sha256(("".join(sums[part] for part in family.parts) + other).encode()).hexdigest()
    return sums


def library(part: str) -> str:
    """The one that loads a part."""
    return "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"


def weights(part: str) -> str | None:
    """The name of the file with a part's weights; None for one that has none."""
    return None if part.startswith(("tokenizer", "scheduler")) else WEIGHTS[library(part)]


def is_base(folder: Path, base: str, known: str) -> bool:
    """Whether `known`, a fingerprint of other days, is this base model's; `base` is today's.

    At first it was of every .safetensors, .json and .txt file, with the ends of lines as they were, and of nothing
    else: kits and the histories of runs have kept such ones. For a plain base model the two are equal.
    """
    return known == base or known == _former(folder)


def _former(folder: Path) -> str:
    total = hashlib.sha256()
    for part in families.of(folder).parts:
        files = (p for p in (folder / part).glob("*") if p.suffix in {".safetensors", ".json", ".txt"} and p.is_file())
        total.update(_sum(sorted(files), as_it_is=True).encode())
    return total.hexdigest()


def _files(folder: Path, part: str) -> list[Path]:
    """What is loaded of a part, by name. Errors: MODEL-03."""
    here, whole = folder / part, weights(part)
    texts = {p for p in here.glob("*") if p.suffix in TEXTS}
    if not texts:
        families.check(folder)  # another kind has other parts, and is not damaged
        raise incomplete(f"{folder} has no {part}/")
    is_words = part.startswith("tokenizer")
    files = texts if is_words else {here / ("config.json" if whole else "scheduler_config.json")}
    if whole:
        if (here / "adapter_config.json").exists():  # transformers would load what it names as well
            raise incomplete(f"{here} has an adapter of its own")
        single, index = _names(whole, _variant(folder, part))
        shards = _shards(here / index) if (here / index).exists() else set()
        files |= shards | {here / index for _ in shards} | {path for path in (here / single,) if path.exists()}
        if len(files) == 1:
            others = ", ".join(sorted(p.name for p in here.glob("*") if p not in texts))
            raise incomplete(
                f"{here} has no weights as safetensors ({whole}); other formats are not read: {others}"[:500]
            )
    if missing := sorted(p.name for p in files if not p.is_file()):
        raise incomplete(f"{here} lacks {', '.join(missing)}"[:500])
    return sorted(files)


def _names(whole: str, variant: str | None) -> tuple[str, str]:
    """(the one file, the index of many) as diffusers and transformers name them."""
    if variant is None:
        return whole, f"{whole}.index.json"
    return whole.replace(".safetensors", f".{variant}.safetensors"), f"{whole}.index.{variant}.json"


def _variant(folder: Path, part: str) -> str | None:
    """Which files of a part are loaded: those in full precision (None), else the copy in half."""
    whole = weights(part) or ""
    there = [any((folder / part / name).exists() for name in _names(whole, variant)) for variant in (None, HALF)]
    return HALF if there == [False, True] else None


def _shards(index: Path) -> set[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_shard(name) for name in names.values()):
        raise incomplete(f"{index} names no safetensors files beside it")
    return {index.parent / name for name in names.values()}


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _remembered(files: list[Path], memory: Path | None) -> str:
    """The files' sum, from `memory` where they are as they were."""
    if memory is None:
        return _sum(files)
    seen = [(str(p.resolve()), (s := p.stat()).st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in files]
    note = memory / f"sum-{hashlib.sha256(repr(('loaded', seen)).encode()).hexdigest()[:32]}.json"
    if note.exists():
        return str(json.loads(note.read_text()))
    total = _sum(files)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, total)
    return total


def _sum(files: list[Path], as_it_is: bool = False) -> str:
    """SHA-256 over names and bytes, of text with lines ended as on Unix. Errors: MODEL-03, unless `as_it_is`."""
    total = hashlib.sha256()
    for path in files:
        if as_it_is or path.suffix == ".safetensors":
            if not as_it_is:
                with readable(path), safe_open(path, "pt"):  # its header
                    pass
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        else:
            if path.suffix == ".json":
                read_json(path)
            digest = hashlib.sha256(read_text(path).replace(b"\r\n", b"\n")).digest()
        total.update(path.name.encode() + digest)
    return total.hexdigest()


# --- its parts --------------------------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """All that sites will load of a base model but its net, loaded once: what is wrong is known before they are asked.

    Errors: MODEL-03, MODEL-05.
    """
    family = families.check(folder)
    family.schedule(folder)
    load(folder, "vae")
    for part in (part for part in family.words if part.startswith("tokenizer")):
        words = len(load(folder, part))
        reads = load(folder, part.replace("tokenizer", "text_encoder"), family.reads).config.get_text_config()
        if words > reads.vocab_size:
            raise incomplete(f"the {part} in {folder} has {words} words, the text encoder knows {reads.vocab_size}")
    if family.large:
        shell(folder)


def load(folder: Path, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """One part alone, frozen; a tokenizer as it is. Errors: MODEL-03, MODEL-05."""
    import diffusers
    import transformers

    family = families.check(folder)
    kind = named if (named := _class(folder, part)) in family.classes[part] else family.classes[part][0]
    if part.startswith("tokenizer"):
        with readable(folder / part):
            return getattr(transformers, kind).from_pretrained(folder / part, local_files_only=True)
    if library(part) == "transformers":
        return _whole(getattr(transformers, kind), folder, part, dtype=dtype)
    return _whole(getattr(diffusers, kind), folder, part, torch_dtype=dtype)


def load_net(folder: Path, dtype: torch.dtype = torch.float32) -> Net:
    """The net alone, frozen, without the rest of the pipeline. Errors: MODEL-03, MODEL-05."""
    return load(folder, families.of(folder).net, dtype)


def shell(folder: Path) -> Net:
    """The net's layers by its settings, with room for an adapter and without its numbers, which only its files' headers
    have to name. Errors: MODEL-03, MODEL-05.
    """
    import diffusers

    family = families.check(folder)
    kind, shapes = getattr(diffusers, family.classes[family.net][0]), dict[str, tuple[int, ...]]()
    for path in (path for path in _files(folder, family.net) if path.suffix == ".safetensors"):
        with readable(path), safe_open(path, "pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 no dict
    with readable(folder / family.net), torch.device("meta"):
        net = kind.from_config(kind.load_config(str(folder), subfolder=family.net, local_files_only=True))
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    if wrong := sorted(key for key in wanted.keys() | shapes.keys() if wanted.get(key) != shapes.get(key)):
        found = f"{folder / family.net}: {len(wrong)} tensors are missing there, not the net's, or of another shape"
        raise incomplete(f"{found}; first: {wrong[0]}")
    for module in net.modules():  # one zero each, seen as many: PEFT asks where a layer's weights are, and how large
        for name, value in module._parameters.items():
            if value is not None:
                zeros = torch.zeros(()).expand(value.shape)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    return net


def _class(folder: Path, part: str) -> Any:
    return read_json(folder / "model_index.json").get(part, [None, None])[1]


def _whole(kind: Any, folder: Path, part: str, **how: Any) -> Net:
    """A part with every tensor from its file: what is missing there, both libraries would draw at random and go on.

    Tensors in the file that the part has no place for mean other settings than its own; a text encoder may be cut
    shorter (people leave out its last layer on purpose) or lie in a file with the picture's. Errors: MODEL-03.
    """
    how |= {"variant": _variant(folder, part), "local_files_only": True, "use_safetensors": True}
    with readable(folder / part):
        loaded, told = kind.from_pretrained(str(folder), subfolder=part, output_loading_info=True, **how)
    lost = sorted(map(str, told["missing_keys"])) + sorted(map(str, told["mismatched_keys"]))
    strange = sorted(map(str, told["unexpected_keys"])) if library(part) == "diffusers" else []
    if lost or strange:
        found = f"{folder / part}: its weights lack {len(lost)} tensors and have {len(strange)} others"
        raise incomplete(f"{found}; first: {(lost + strange)[0]}")
    if broken := [name for name, value in loaded.named_parameters() if not value.isfinite().all()]:
        raise incomplete(f"{folder / part}: {len(broken)} tensors with numbers that are not finite; first: {broken[0]}")
    return loaded.requires_grad_(False)


def lora_config(family: Family, config: RunConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """PEFT's LoraConfig of an adapter whose layers have these ranks."""
    from peft import LoraConfig

    return LoraConfig(**lora.settings(ranks, family.targets[config.lora_targets], config), init_lora_weights="gaussian")


def add_adapter(net: Net, family: Family, config: RunConfig) -> None:
    """Put a fresh adapter (B = 0, A seeded by `config.seed`) on a frozen net, its parameters float32 and trainable.

    Errors: CONFIG-05 (rank-pattern names no layer that gets an adapter).
    """
    ranks = lora.ranks((name for name, _ in net.named_modules()), family, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net.add_adapter(lora_config(family, config, ranks))
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def add_layers(net: Net, adapter: Adapter) -> None:
    """Room for that very adapter (alpha = rank) on a frozen net, whatever its layers: PEFT takes a name in a list for
    the end of one too, and a pattern for the whole.

    Errors: ADAPTER-01 (no such layer).
    """
    from peft import LoraConfig

    layers, known = sorted({key.rsplit(".lora_", 1)[0] for key in adapter}), dict(net.named_modules())
    if lost := [name for name in layers if not isinstance(known.get(name), (torch.nn.Linear, torch.nn.Conv2d))]:
        raise _misfit(f"{len(lost)} of its {len(layers)} layers are not in this base model; first: {lost[0]}")
    ranks = lora.ranks_of(adapter)
    settings = lora.settings(ranks, layers, RunConfig(lora_rank=max(ranks.values())))
    net.add_adapter(LoraConfig(**settings | {"target_modules": "|".join(map(re.escape, layers))}))


def adapter_of(net: Net) -> Adapter:
    """A copy of the adapter: PEFT's keys without the adapter's name, float32, on the CPU, in key order."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(net, save_embedding_layers=False)  # "auto" looks for the base model by its name
    return {key: state[key].detach().to("cpu", torch.float32, copy=True).contiguous() for key in sorted(state)}


def check_adapter(adapter: Adapter, reference: Adapter) -> None:
    """AdapterError unless keys, shapes and types are those of `reference` and every number is finite."""
    missing, extra = sorted(reference.keys() - adapter.keys()), sorted(adapter.keys() - reference.keys())
    wrong = [
        k
        for k in adapter.keys() & reference.keys()
        if (adapter[k].shape, adapter[k].dtype) != (reference[k].shape, reference[k].dtype)
    ]
    if missing or extra or wrong:
        found = f"{len(missing)} keys missing, {len(extra)} extra, {len(wrong)} of another shape or type"
        raise _misfit(f"{found}; first: {(missing + extra + sorted(wrong))[0]}")
    if broken := [key for key, value in adapter.items() if not torch.isfinite(value).all()]:
        raise AdapterError(
            "ADAPTER-02",
            found=f"NaN or infinity in {len(broken)} of {len(adapter)} tensors; first: {broken[0]}",
            fix='lower learning-rate, or use precision = "fp32"',
        )


def _misfit(found: str) -> AdapterError:
    fix = "use the same base-model, lora-rank and lora-targets as the run that made it"
    return AdapterError("ADAPTER-01", found=found, fix=fix)


def apply_adapter(net: Net, adapter: Adapter) -> str:
    """Load `adapter` strictly into the net's adapter; returns the hash of what the net then holds."""
    from peft import set_peft_model_state_dict

    check_adapter(adapter, adapter_of(net))
    set_peft_model_state_dict(net, adapter)
    return adapter_hash(adapter_of(net))


def adapter_hash(adapter: Mapping[str, Tensor]) -> str:
    """SHA-256 over keys, shapes and little-endian bytes, in key order."""
    total = hashlib.sha256()
    for key in sorted(adapter):
        value = adapter[key].contiguous()
        total.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def new_adapter(folder: Path, config: RunConfig) -> Adapter:
    """The first global adapter of a run."""
    family = families.of(folder)
    net = shell(folder) if family.large else load_net(folder)
    add_adapter(net, family, config)
    return adapter_of(net)
