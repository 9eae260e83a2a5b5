"""The estimate of a round's memory against what was measured on a GPU, against real steps on the CPU, and against
torch's own autocast.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from app import model
from app.config import RunConfig
from app.families import sd
from app.site import cache, diffusion
from benchmarks.gpu.gpu import Shape, new_unet
from bouquet.site import estimate
from tests.kit import tiny

GIB = 2**30
MINI = tiny.ROOT / "models" / "mini"


def config(**changes) -> RunConfig:
    return RunConfig.read({name.replace("_", "-"): value for name, value in changes.items()})


# --- what is alive
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_alive_is_counted_by_storage_and_in_blocks_of_512_bytes(device: str) -> None:
    known = torch.zeros(1000, device=device)
    with estimate.Alive([known]) as alive:
        one = torch.zeros(100, 100, device=device)  # 40,000 bytes: 79 blocks
        view = one.t()[3:].reshape(97, 10, 10)
        known.view(10, 100).add_(1)
        assert alive.now == alive.most == 79 * 512
        two = torch.zeros(1, device=device)
        assert alive.now == 80 * 512
        del one, two
        assert (alive.now, alive.most) == (79 * 512, 80 * 512)
        del view
        assert (alive.now, alive.most) == (0, 80 * 512)


def of(batch: int, channels: int, side: int, tokens: int, width: int) -> estimate.Inputs:
    """What a Stable Diffusion's UNet is given, without contents."""
    shapes = (batch, channels, side, side), (batch,), (batch, tokens, width)
    latents, told, text = (torch.empty(shape, device="meta") for shape in shapes)
    return estimate.Inputs(latents, told, {"text": text})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_without_contents_holds_what_torchs_profiler_sees_a_real_step_hold(checkpointing: bool) -> None:
    run = config(batch_size=8, gradient_checkpointing=checkpointing)
    unet = model.load_net(MINI)
    model.add_adapter(unet, sd.FAMILY, run)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for parameter in unet.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = torch.randn(8, 4, 16, 16), torch.zeros(8), torch.randn(8, 24, 128)
    kept, most = estimate.step_of(
        estimate._net(MINI, sd.FAMILY, run, half=False), sd.FAMILY, of(8, 4, 16, 24, 128), half=False
    )
    # the same count on real tensors
    given = estimate.Inputs(inputs[0], inputs[1], {"text": inputs[2]})
    assert estimate.step_of(unet, sd.FAMILY, given, half=False) == pytest.approx((kept, most), rel=0.003)
    # 3 %: of the CPU's kernels some have a scratch of their own for each thread, half a megabyte here
    assert peak_by_profiler(lambda: F.mse_loss(unet(*inputs).sample, inputs[0]).backward()) == pytest.approx(
        most, rel=0.03
    )
    assert kept < most


def peak_by_profiler(work) -> int:
    """The most bytes that the CPU's allocator handed out at once.

    What earlier tests left in circles goes before: freed within, it would be taken off what the work holds.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_floor_and_need_bracket_what_a_real_step_takes_on_the_cpu(checkpointing: bool) -> None:
    """Weights and AdamW's moments are the formula's; the step's part is the profiler's, as above."""
    run = config(batch_size=8, gradient_checkpointing=checkpointing)
    guess = estimate.estimate(MINI, run, half=False, on_gpu=False)
    unet = model.load_net(MINI)
    frozen = sum(p.numel() for p in unet.parameters())
    model.add_adapter(unet, sd.FAMILY, run)
    adapter = sum(p.numel() for p in unet.parameters()) - frozen
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    inputs = torch.randn(8, 4, 16, 16), torch.zeros(8), torch.randn(8, 24, 128)
    step = peak_by_profiler(lambda: F.mse_loss(unet(*inputs).sample, inputs[0]).backward())
    real = 4 * frozen + 4 * adapter + 8 * adapter + step  # numbers, moments; the gradients are in the step
    assert guess.floor < real < guess.need
    assert real == pytest.approx(guess.peak, rel=0.15)


# --- autocast's types
# --------------------------------------------------------------------------------------------------


def header(name: str) -> set[str]:
    """The functions of one of the lists in ATen/autocast_mode.h, which torch's wheels bring along."""
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    return set(re.findall(r"_\((\w+)", text.split(f"#define {name}(_)")[1].split("\n\n")[0]))


# of some names
PYTHON = {"__matmul__": "matmul", "__pow__": "pow", "interpolate": "upsample_nearest2d", "norm": "linalg_vector_norm"}


def test_every_function_is_cast_as_torchs_lists_for_cuda_say() -> None:
    lower, whole = (
        header("AT_FORALL_LOWER_PRECISION_FP"),
        header("AT_FORALL_FP32") | header("AT_FORALL_FP32_SET_OPT_DTYPE"),
    )
    assert {PYTHON.get(name, name) for name in estimate.LOWER} <= lower
    assert {PYTHON.get(name, name) for name in estimate.WHOLE} <= whole


def test_of_what_a_unet_calls_nothing_that_autocast_casts_is_left_out() -> None:
    called = set()

    class Listen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    run = config(batch_size=2)
    unet = estimate._net(MINI, sd.FAMILY, run, half=False)
    with Listen():
        diffusion.predict(unet, sd.FAMILY, *of(2, 4, 16, 24, 128))
    cast = header("AT_FORALL_LOWER_PRECISION_FP") | header("AT_FORALL_FP32") | header("AT_FORALL_FP32_SET_OPT_DTYPE")
    expected = {name for name in called if PYTHON.get(name, name) in cast}
    assert {"conv2d", "linear", "group_norm", "layer_norm", "scaled_dot_product_attention", "interpolate"} <= expected
    assert expected <= estimate.LOWER | estimate.WHOLE


@pytest.mark.skipif(not torch.version.cuda, reason="torch has no CUDA here; its build for CUDA needs no GPU for this")
@pytest.mark.parametrize("base", [tiny.base, lambda: MINI], ids=["tiny", "mini"])
def test_a_forward_pass_leaves_as_much_alive_as_under_torchs_own_autocast(base) -> None:
    """On fake CUDA tensors, which go through torch's own autocast and autograd."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Tiles(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
            return function(*args, **(kwargs or {}))

    unet = estimate._net(base(), sd.FAMILY, config(batch_size=4), half=True)
    shapes = [(4, 4, 16, 16), (4,), (4, 24, unet.config.cross_attention_dim)]
    kept, _ = estimate.step_of(unet, sd.FAMILY, of(4, 4, 16, 24, unet.config.cross_attention_dim), half=True)
    with FakeTensorMode(), Tiles():
        for module in unet.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(value.shape, dtype=value.dtype, device="cuda"), value.requires_grad
                    )
        latents, t, text = (torch.empty(shape, device="cuda") for shape in shapes)
        try:
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", True)
            with estimate.Alive([*unet.parameters(), latents, text]) as alive:
                predicted = unet(latents.to(unet.dtype), t, text.to(unet.dtype)).sample
                loss = F.mse_loss(predicted.float(), torch.empty_like(latents))
                # the flash attention of a GPU keeps its random state, too
                assert alive.now == pytest.approx(kept, rel=0.01)
                del loss
        finally:
            torch.set_autocast_enabled("cuda", False)


# --- Stable Diffusion 1.5, measured on a GPU
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configs of its UNet and its autoencoder, without weights."""
    base = tmp_path_factory.mktemp("models") / "sd15"
    new_unet(Shape(), "meta").save_config(base / "unet")
    with torch.device("meta"):
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).save_config(base / "vae")  # fmt: skip
    classes = {part: [model.library(part), kinds[0]] for part, kinds in sd.FAMILY.classes.items()}
    text = {"model_type": "clip_text_model", "hidden_size": 768, "max_position_embeddings": 77}
    noise = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for file, settings in {
        "model_index.json": {"_class_name": sd.FAMILY.pipeline} | classes,
        "text_encoder/config.json": text,
        "tokenizer/tokenizer_config.json": {},
        "scheduler/scheduler_config.json": noise,
    }.items():
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(json.dumps(settings))
    return base


def sd15_run(batch_size: int, **changes) -> RunConfig:
    return config(resolution=512, batch_size=batch_size, lora_rank=8, lora_targets="attention", **changes)


@functools.cache
def guess(base: Path, batch_size: int, checkpointing: bool = False, **more: int) -> estimate.Estimate:
    return estimate.estimate(
        base, sd15_run(batch_size, gradient_checkpointing=checkpointing), half=True, on_gpu=True, **more
    )


@pytest.mark.parametrize(("batch_size", "measured"), [(8, 10.4), (64, 71.0)])
def test_the_peak_is_the_one_measured_on_an_h200(sd15: Path, batch_size: int, measured: float) -> None:
    """torch.cuda.max_memory_allocated of train.fit: UNet and autocast in bf16, AdamW, 64² latents, text of 77 x 768, no
    checkpointing.
    """
    said = guess(sd15, batch_size)
    assert said.peak / GIB == pytest.approx(measured, rel=0.03)  # 0.2 is what is promised
    assert said.floor < said.peak < said.need < 1.2 * measured * GIB


def test_what_does_not_depend_on_the_batch_is_the_models_own_numbers(sd15: Path) -> None:
    """The line through 8 and 64 images, at none: bf16 numbers, and the adapter's in float32 with gradients and two
    moments.
    """
    eight, many = guess(sd15, 8).floor, guess(sd15, 64).floor
    assert eight - 8 * (many - eight) / 56 == pytest.approx(2 * 859_520_964 + 16 * 1_594_368, rel=0.01)


@pytest.mark.slow
def test_checkpointing_keeps_the_inputs_of_the_blocks_and_computes_one_at_a_time_again(sd15: Path) -> None:
    """By hand, an image of 64² latents, in (channels, side): what enters each resnet, in bf16; of each transformer
    what enters its first norm, which autocast has in float32, its two convolutions and its block, in bf16.
    """
    down = [(320, 64)] * 2 + [(320, 32), (640, 32), (640, 16), (1280, 16)] + [(1280, 8)] * 2
    up = (
        [(2560, 8)] * 3
        + [(2560, 16)] * 2
        + [(1920, 16), (1920, 32), (1280, 32), (960, 32), (960, 64), (640, 64), (640, 64)]
    )
    transformers = [(320, 64)] * 5 + [(640, 32)] * 5 + [(1280, 16)] * 5 + [(1280, 8)]
    resnets = down + [(1280, 8)] * 2 + up
    assert len(resnets) == 8 + 2 + 12
    by_hand = sum(2 * c * side**2 for c, side in resnets) + sum((4 + 3 * 2) * c * side**2 for c, side in transformers)
    eight, again = guess(sd15, 8), guess(sd15, 8, True)
    own = 2 * 859_520_964 + 16 * 1_594_368
    # beside it: the last norm, what enters the samplers, text and time
    assert 8 * by_hand < again.floor - own < 8 * 1.2 * by_hand
    assert again.floor - own < 0.2 * (eight.floor - own) and again.peak - own < 0.3 * (eight.peak - own)
    geglu = 4096 * 2 * 4 * 320 * 2  # bytes of the widest row inside a transformer of 64²
    assert again.peak > again.floor + 8 * 2 * geglu  # with its gradient


@pytest.mark.slow
def test_evaluation_and_encoding_count_where_they_take_more_than_a_step(sd15: Path) -> None:
    step = guess(sd15, 8, True).peak
    assert (
        guess(sd15, 8, True, evaluated=64, encoded=1).peak > step < guess(sd15, 8, True, evaluated=1, encoded=16).peak
    )
    assert guess(sd15, 8, evaluated=32).peak == guess(sd15, 8).peak  # without checkpointing the step is the larger


@pytest.mark.slow
def test_the_sum_of_the_parts_is_the_estimate() -> None:
    run, parts = tiny.config(), {"half": False}
    unet = tiny.unet()
    adapter = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in unet.parameters()) - adapter
    kept, step = estimate.step_of(
        estimate._net(tiny.base(), sd.FAMILY, run, False), sd.FAMILY, of(4, 4, 8, 24, 16), half=False
    )
    on_gpu, on_cpu = (
        estimate.estimate(tiny.base(), run, **parts, on_gpu=on_gpu, photos=10) for on_gpu in (True, False)
    )
    photos = 10 * (4 * 4 * 8 * 8 + 2 * 24 * 16)  # float32 latents of 16² pixels, half a caption of 24 tokens
    assert on_gpu.floor == 4 * frozen + 16 * adapter + kept
    assert on_cpu.floor == on_gpu.floor + photos and on_cpu.peak == on_gpu.peak + photos
    assert on_gpu.peak == 4 * frozen + max(
        16 * adapter + step, 4 * adapter + estimate.encoding_of(tiny.base(), (16, 16), 1)
    )
    assert (on_gpu.need, on_cpu.need) == (int(1.05 * on_gpu.peak + GIB), int(2 * on_cpu.peak + GIB))
    pulled = estimate.estimate(tiny.base(), tiny.config(proximal_mu=0.1), **parts, on_gpu=True)
    assert pulled.floor == on_gpu.floor + 4 * adapter


def test_attention_may_be_called_by_keyword() -> None:
    rows = {name: torch.empty(2, 4, 256, 8, device="meta", requires_grad=True) for name in ("query", "key", "value")}
    with estimate.OnGpu(half=True), estimate.Alive(rows.values()) as alive:
        out = F.scaled_dot_product_attention(**rows, dropout_p=0.0, is_causal=False)
    assert out.shape == (2, 4, 256, 8) and out.dtype == torch.bfloat16
    assert alive.now < 2 * 4 * 256 * 256  # never the whole matrix
    real = {name: torch.randn(2, 4, 16, 8) for name in rows}
    with estimate.OnGpu(half=False):
        assert torch.equal(
            F.scaled_dot_product_attention(**real, scale=0.5), F.scaled_dot_product_attention(*real.values(), scale=0.5)
        )


# --- the tokens of a caption
# -------------------------------------------------------------------------------------------


def folder(to: Path, encoder: dict, **tokenizer) -> Path:
    for part, settings in (("text_encoder", encoder), ("tokenizer", tokenizer)):
        (to / part).mkdir(parents=True)
        (to / part / ("config.json" if part == "text_encoder" else "tokenizer_config.json")).write_text(
            json.dumps(settings)
        )
    return to


@pytest.mark.parametrize(
    "unset", [1e30, 10**30, 1000000000000000019884624838656, "77", None, True, -1, 0, float("nan"), float("inf"), [77]]
)
def test_a_tokenizer_whose_length_is_unset_or_odd_has_as_many_tokens_as_the_text_encoder_has_positions(
    tmp_path: Path, unset
) -> None:
    assert sd.FAMILY.tokens(folder(tmp_path, {"max_position_embeddings": 24}, model_max_length=unset)) == 24


@pytest.mark.parametrize(
    ("encoder", "tokenizer", "tokens"),
    [
        ({"max_position_embeddings": 77}, {}, 77),
        ({}, {"model_max_length": 10**30}, 77),  # CLIPTextConfig's own default
        ({"max_position_embeddings": 77}, {"model_max_length": 24}, 24),
        ({"max_position_embeddings": 77}, {"model_max_length": 512}, 77),  # more would have no position
        ({"text_config": {"max_position_embeddings": 32}}, {}, 32),
    ],
)
def test_a_caption_has_the_fewer_of_both_parts_tokens(
    tmp_path: Path, encoder: dict, tokenizer: dict, tokens: int
) -> None:
    assert sd.FAMILY.tokens(folder(tmp_path, encoder, **tokenizer)) == tokens


@pytest.fixture
def unset(tmp_path: Path) -> Path:
    """The small base model with a tokenizer that leaves its length unset."""
    base = Path(shutil.copytree(tiny.base(), tmp_path / "models/tiny"))
    file = base / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 10**30}))
    return base


def test_captions_are_encoded_the_same_where_the_tokenizers_length_is_unset(unset: Path) -> None:
    captions = ["", *tiny.CAPTIONS, "rose " * 99]
    (as_set, cut), (as_unset, too) = (
        cache._encode_captions(captions, base, torch.device("cpu")) for base in (tiny.base(), unset)
    )
    assert cut == too == {cache._digest(captions[-1]): "cut"}
    assert as_set.keys() == as_unset.keys() and len(as_set) == 5
    for key, row in as_set.items():
        assert row["text"].shape == (24, 16) and torch.equal(row["text"], as_unset[key]["text"])


def test_the_estimate_is_the_same_where_the_tokenizers_length_is_unset(unset: Path) -> None:
    one, other = (estimate.estimate(base, tiny.CONFIG, half=True, on_gpu=True) for base in (tiny.base(), unset))
    assert one == other
