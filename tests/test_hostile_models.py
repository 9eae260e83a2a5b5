"""Base models, LoRA files and settings that somebody made to break a reader: refused by name, at little cost."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app import families, model
from app.adapter import formats, sample
from app.config import RunConfig
from app.errors import BouquetError
from app.families import sd
from tests.kit import tiny
from tests.test_hostile_files import DEEP, STRANGE_JSON, code_of

# --- base models ---

SETTINGS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)


def copy(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.base(), tmp_path / "base")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_base_models_settings_that_are_no_object_are_refused_by_name(tmp_path, name):
    base = copy(tmp_path)
    for text in STRANGE_JSON:
        (base / name).write_text(text)
        assert code_of(lambda: model.fingerprint(base)) == "MODEL-03", text[:20]
        if name.endswith(("encoder/config.json", "tokenizer_config.json")):
            assert code_of(lambda: families.of(base).tokens(base)) == "MODEL-03", text[:20]
    (base / name).unlink()
    os.mkfifo(base / name)
    assert code_of(lambda: model.fingerprint(base)) == "MODEL-03"


ANSWERS = [
    {},
    {"num_train_timesteps": 10**12},
    {"num_train_timesteps": "x"},
    {"beta_schedule": "x"},
    {"trained_betas": "x"},
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_a_schedule_that_cannot_be_made_is_refused_by_name(tmp_path, answer):
    base = copy(tmp_path)
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(answer))
    assert code_of(lambda: sd.FAMILY.schedule(base)) in ((None,) if not answer else ("MODEL-03",))


@pytest.mark.parametrize(
    "answer",
    [
        {"block_out_channels": "x"},
        {"block_out_channels": [8, 24]},
        {"down_block_types": ["No", "No"]},
        {"act_fn": "no"},
    ],
)
def test_parts_that_cannot_be_made_are_refused_by_name(tmp_path, answer):
    base = copy(tmp_path)
    for part in ("unet", "vae"):
        settings = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps(settings | answer))
    assert code_of(lambda: model.load_net(base)) == "MODEL-03"
    assert code_of(lambda: model.load(base, "vae")) == "MODEL-03"
    assert code_of(lambda: sample.pipeline(base, tiny.CONFIG)) == "MODEL-03"


@pytest.mark.parametrize("value", [None, "77", [], {}, -1, 0, float("nan"), float("inf"), 1e300, True])
def test_a_number_of_tokens_is_one_whatever_the_settings_say(tmp_path, value):
    base = copy(tmp_path)
    for name, text in (
        ("tokenizer/tokenizer_config.json", {"model_max_length": value}),
        ("text_encoder/config.json", {"text_config": value}),
    ):
        (base / name).write_text(json.dumps(text))
    assert families.of(base).tokens(base) == 77


# --- LoRA files ---

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def lora(a=None, b=None, **more) -> dict[str, torch.Tensor]:
    """One layer of kohya's."""
    name = formats.kohya_name(LAYER)
    parts = {
        "lora_down.weight": torch.ones(2, 8) if a is None else a,
        "lora_up.weight": torch.ones(8, 2) if b is None else b,
    } | more
    return {f"{name}.{part}": value for part, value in parts.items()}


def raw(header: dict, size: int = 0) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(kind: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def both(kind: str, size: int) -> bytes:
    """A and B of eight numbers each in a type that torch may not have."""
    name, half = formats.kohya_name(LAYER), 8 * size // 8
    a, b = entry(kind, [2, 4], 0, half), entry(kind, [4, 2], half, 2 * half)
    return raw({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, 2 * half)


BAD_LORAS = {
    "rank 0": lora(torch.ones(0, 8), torch.ones(8, 0)),
    "rank 513": lora(torch.ones(513, 1), torch.ones(1, 513)),
    "no dimension": lora(torch.tensor(1.0), torch.tensor(1.0)),
    "one dimension": lora(torch.ones(8), torch.ones(8)),
    "three dimensions": lora(torch.ones(2, 8, 1), torch.ones(8, 2, 1)),
    "empty": lora(torch.ones(2, 0), torch.ones(0, 2)),
    "whole numbers": lora(torch.ones(2, 8, dtype=torch.int64), torch.ones(8, 2, dtype=torch.int64)),
    "truth": lora(torch.ones(2, 8, dtype=torch.bool), torch.ones(8, 2, dtype=torch.bool)),
    "alpha NaN": lora(alpha=torch.tensor(float("nan"))),
    "alpha infinite": lora(alpha=torch.tensor(float("inf"))),
    "alpha of no number": lora(alpha=torch.ones(0)),
    "alpha of two": lora(alpha=torch.ones(2)),
    "alpha as truth": lora(alpha=torch.tensor(True)),
    "alpha alone": {f"{formats.kohya_name(LAYER)}.alpha": torch.tensor(1.0)},
    "two names for one": lora() | {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8)},
    "ten thousand layers": {f"unet.mid_block.{n}.to_q.lora_A.weight": torch.ones(1, 1) for n in range(10_001)},
    "a key without an end": {"unet.mid_block." + "x" * 1_000_000: torch.ones(1)},
    "nothing": {},
    "bytes": b"x" * 100,
    "no bytes": b"",
    "a header of 2 GB": struct.pack("<Q", 2**31) + b"{}",
    "a deep header": struct.pack("<Q", 10**5) + DEEP.encode(),
    "a pickle": b"PK\3\4junk",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "a claim of 8 GB": raw({f"{formats.kohya_name(LAYER)}.lora_down.weight": entry("F32", [2, 10**9], 0, 8 * 10**9)}),
    "more numbers than there are": raw(
        {f"{formats.kohya_name(LAYER)}.lora_down.weight": entry("F32", [2**40, 2**40], 0, 4)}, 4
    ),
    "eight-bit exponents": both("F8_E8M0", 8),
    "complex numbers": both("C64", 64),
    "four bits": both("F4", 4),
    "unknown bits": both("X99", 8),
}


@pytest.mark.parametrize("name", BAD_LORAS)
def test_a_lora_that_is_none_is_refused_by_name(tmp_path, name):
    path, content = tmp_path / "flowers.safetensors", BAD_LORAS[name]
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    assert code_of(lambda: formats.read_lora(path)) == "EXPORT-03"
    assert code_of(lambda: formats.open_adapter(path)) == "EXPORT-03"


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_every_precision_are_read(tmp_path, kind):
    ones = lora(
        torch.ones(2, 8).to(kind), torch.ones(8, 2).to(kind), alpha=torch.tensor(1)
    )  # a whole number, as some tools write it
    save_file(ones, tmp_path / "flowers.safetensors")
    found = formats.read_lora(tmp_path / "flowers.safetensors").adapter[f"{LAYER}.lora_B.weight"]
    assert found.dtype == torch.float32 and torch.equal(found, torch.full((8, 2), 0.5))  # alpha over rank


def test_a_file_larger_than_any_lora_is_not_read(tmp_path):
    size = 8 * 10**9
    layer = entry("F32", [2, 10**9], 0, size)
    with (tmp_path / "flowers.safetensors").open("wb") as file:
        file.write(raw({f"{formats.kohya_name(LAYER)}.lora_down.weight": layer}))
        file.truncate(file.tell() + size)  # sparse: takes no room on disk
    assert code_of(lambda: formats.read_lora(tmp_path / "flowers.safetensors")) == "EXPORT-03"


def test_a_pipe_or_folder_in_a_loras_place_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder", "absent"):
        assert code_of(lambda name=name: formats.read_lora(tmp_path / f"{name}.safetensors")) == "EXPORT-03"


ALPHAS = [
    json.dumps({"lora_alpha": alpha}) for alpha in ("2", [2], {}, True, 10**400, float("nan"), float("inf"), 1e300)
]


@pytest.mark.parametrize("text", STRANGE_JSON + ALPHAS, ids=range(len(STRANGE_JSON + ALPHAS)))
def test_settings_of_a_lora_that_are_none_are_refused_by_name(tmp_path, text):
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "flowers.safetensors", metadata={"lora_adapter_metadata": text})
    assert code_of(lambda: formats.read_lora(tmp_path / "flowers.safetensors")) == "EXPORT-03"
    save_file(tensors, tmp_path / formats.PEFT)
    (tmp_path / "adapter_config.json").write_text(text)
    assert code_of(lambda: formats.open_adapter(tmp_path)) == "EXPORT-03"


@pytest.mark.parametrize("name", ["provenance.json", "history.json"])
def test_notes_of_a_run_that_are_none_are_refused_by_name(tmp_path, name):
    (run := tmp_path / "run").mkdir()
    save_file(
        {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)},
        run / formats.PEFT,
    )
    for text in STRANGE_JSON:
        (tmp_path / name).write_text(text)
        assert code_of(lambda: formats.open_adapter(run)) == "EXPORT-03", text[:20]
    for config in ({"rounds": 10**400}, {"seed": "x"}, {"x" * 10**6: 1}, {"base_model": "\ud800"}):
        (tmp_path / name).write_text(json.dumps({"config": {k: v for k, v in config.items() if k != "rounds"}}))
        assert code_of(lambda: formats.open_adapter(run)) in (None, "CONFIG-01", "CONFIG-02", "EXPORT-03")


def test_an_older_runs_many_prompts_do_not_keep_its_adapter_from_being_opened(tmp_path):
    save_file(
        {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)},
        tmp_path / formats.PEFT,
    )
    config = {"base_model": "mini", "sample_prompts": "|".join(["a rose " * 100] * 40)}
    (tmp_path / "provenance.json").write_text(json.dumps({"config": config}))
    prompts = formats.open_adapter(tmp_path)[1].prompts
    assert len(prompts) == 16 and {len(prompt) for prompt in prompts} <= {499, 500}


# --- settings ---

VALUES = [
    None,
    True,
    10**400,
    -(10**400),
    10**5000,
    2**64,
    -1,
    1.5,
    float("nan"),
    float("-inf"),
    1e308,
    "",
    "x" * 10**6,
    "\0",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    b"a",
    [1],
    {},
]
KEYS = [name.replace("_", "-") for name in RunConfig.__dataclass_fields__]


@pytest.mark.parametrize("key", KEYS)
def test_whatever_a_setting_is_it_is_taken_or_refused_by_name(key):
    for value in VALUES:
        assert code_of(lambda value=value: RunConfig.read({key: value})) in (None, "CONFIG-02"), value


@pytest.mark.parametrize("key", [key for key in KEYS if type(getattr(RunConfig(), key.replace("-", "_"))) is float])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["400 digits", "below", "5000 digits"])
def test_a_whole_number_beyond_every_fraction_is_out_of_range(key, value):
    with pytest.raises(BouquetError, match="CONFIG-02") as caught:
        RunConfig.read({key: value})
    assert "a number from" in caught.value.fix and "bits" in caught.value.found


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "a\0b", "a\nb", "\x1b[2J", "a\ud800"], ids=["long", "null", "lines", "escape", "half"]
)
@pytest.mark.parametrize("key", ["base-model", "resume", "start-from", "sample-prompts"])
def test_a_text_is_one_printable_line_of_bounded_length(key, value):
    with pytest.raises(BouquetError, match="CONFIG-02") as caught:
        RunConfig.read({key: value})
    assert "printable line of at most" in caught.value.fix and len(caught.value.report()) < 1000


def test_prompts_are_sixteen_of_500_characters_and_the_refusal_says_so():
    longest = "|".join(["x" * 500] * 16)
    assert len(RunConfig.read({"sample-prompts": longest}).prompts) == 16
    for prompts in (longest + "|y", "x" * 501, "y|" * 500_000, "x" * 10**6):
        with pytest.raises(BouquetError, match="CONFIG-02") as caught:
            RunConfig.read({"sample-prompts": prompts})
        assert "9000 characters" in caught.value.fix or "16 prompts of 500 characters" in caught.value.fix


def test_a_key_of_a_megabyte_is_refused_in_a_line():
    for key in ("x" * 10**6, "\x1b[2J", "\ud800"):
        with pytest.raises(BouquetError, match="CONFIG-01") as caught:
            RunConfig.read({key: 10**5000})
        assert len(caught.value.report()) < 1000
