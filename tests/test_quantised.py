"""The frozen base as codes: levels and bytes by hand, what a layer and a whole net say and learn, in every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from app import families, model
from app.config import RunConfig
from app.site import diffusion, quantised, train
from bouquet.site import estimate
from tests.kit import families as kit
from tests.kit import tiny
from tests.test_families import config, photos

CPU = torch.device("cpu")
KINDS = ("int8", "nf4")
# Dettmers et al. 2023, arXiv:2305.14314, appendix E
PAPERS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def coded(kind: str, weight: Tensor, dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> quantised.Coded:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return quantised.KINDS[kind](layer, dtype, CPU)


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_the_sixteen_levels_are_the_papers():
    torch.testing.assert_close(quantised.levels(), torch.tensor(PAPERS), rtol=0, atol=1e-6)


def test_nf4_by_hand():
    """One block of 64 with a largest number of 2: each number's share of 2 is coded as the nearest level."""
    weight = torch.zeros(2, 32)
    weight[0, :4] = torch.tensor([-2.0, 1.0, 0.16, -0.19])  # shares -1, 0.5, 0.08, -0.095
    layer = coded("nf4", weight)
    # levels 0, 12 (0.4407; 13 is 0.5626, and 0.5 is below their middle), 8, 6; all other numbers are level 7, a zero
    assert layer.weight[:2].tolist() == [0 * 16 + 12, 8 * 16 + 6] and set(layer.weight[2:].tolist()) == {7 * 16 + 7}
    assert layer.scale.tolist() == [[2.0]]
    want = torch.zeros(2, 32)
    want[0, :4] = 2 * torch.tensor([PAPERS[0], PAPERS[12], PAPERS[8], PAPERS[6]])
    torch.testing.assert_close(layer.whole(), want, rtol=0, atol=1e-6)


def test_int8_by_hand():
    """Rows with a largest number of 1.27 and of 254, and one of zeros."""
    layer = coded("int8", torch.tensor([[1.27, 0.034, -1.0], [254.0, 3.1, -2.9], [0.0, 0.0, 0.0]]))
    assert layer.weight.tolist() == [[127, 3, -100], [127, 2, -1], [0, 0, 0]]
    want = torch.tensor([[1.27, 0.03, -1.0], [254.0, 4.0, -2.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(layer.whole(), want, rtol=0, atol=1e-6)


def test_no_number_is_further_off_than_half_a_step():
    """int8: half of a 127th of its row's largest. nf4: half of the widest gap, from -1 to -0.6962, of its block's, and
    what the scale loses as a bfloat16 (2^-9).
    """
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 96)[:, None]
    off = (coded("int8", weight).whole() - weight).abs() / weight.abs().amax(1, keepdim=True)
    assert off.max() <= 0.5 / 127 * 1.0001
    blocks = weight.reshape(-1, 64)
    off = (coded("nf4", weight).whole().reshape(-1, 64) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
    assert off.max() <= (1 - 0.6961928) / 2 + 2**-9


def test_normal_numbers_lose_as_little_as_the_paper_means_them_to():
    """Root of the mean square, as a share: 16 levels spread by quantiles lose 9 %, 255 even ones half a per cent."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    lost = {kind: float((coded(kind, weight).whole() - weight).norm() / weight.norm()) for kind in KINDS}
    assert lost == pytest.approx({"int8": 0.0074, "nf4": 0.092}, rel=0.1)


# --- a layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_says_what_a_linear_layer_with_the_coded_numbers_says_and_so_does_its_gradient(kind, dtype):
    draw = torch.Generator().manual_seed(2)
    layer = coded(kind, torch.randn(32, 64, generator=draw), dtype, torch.randn(32, generator=draw))
    x = torch.randn(4, 7, 64, generator=draw).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    F.linear(y, layer.whole(), layer.bias.to(dtype)).square().sum().backward()
    layer(x).square().sum().backward()
    assert layer.whole().dtype == layer(x).dtype == dtype
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_in_full_are_not_kept_for_the_way_back(kind):
    """A Linear's float32 weight is 1 MiB; while the gradient is awaited, none of that is alive beside the codes."""
    layer = coded(kind, torch.randn(512, 512))
    x = torch.randn(2, 512, requires_grad=True)
    with estimate.Alive([*layer.parameters(), x]) as alive:
        said = layer(x)
        now = alive.now
    assert now <= 2 * 512 * 4 + 2048 < alive.most and said.requires_grad  # what it says, and the table of 256 bytes


# --- a net ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kit.ALL)
def test_blocks_are_coded_and_what_is_outside_them_stays(name):
    net = model.load_net(kit.base(name))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    chosen = quantised.layers(net)
    quantised.quantise(net, "int8", torch.float32, CPU)
    assert chosen and all(isinstance(net.get_submodule(layer), quantised.Int8) for layer in chosen)
    after, codes = net.state_dict(), {f"{layer}.weight" for layer in chosen}
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - codes)
    assert not any("embed" in layer.split(".")[0] or layer.startswith("proj_out") for layer in chosen)
    assert net.dtype == torch.float32  # in which it is asked


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "nf4"), ("flux", "int8"), ("zimage", "nf4")])
def test_the_loss_falls_on_a_coded_base_with_gradient_checkpointing(name, kind):
    run = config(
        name, local_steps=12, batch_size=4, gradient_checkpointing=True, caption_dropout=0.0, base_precision=kind
    )
    objective, net = train.load(kit.base(name), run, train.accelerator(run))
    assert any(isinstance(module, quantised.KINDS[kind]) for module in net.modules())
    frozen = {key: value.clone() for key, value in net.state_dict().items() if ".lora_" not in key}
    encoded = photos(name)
    measure = lambda: diffusion.validation_loss(net.eval(), objective, encoded, CPU, timesteps=4, batch_size=4)  # noqa: E731
    before = measure()
    train.fit(net, objective, encoded, run, train.accelerator(run), seed=1)
    assert measure() < 0.95 * before
    assert all(torch.equal(net.state_dict()[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("name", kit.ALL)
def test_its_adapter_has_the_hubs_shapes_and_goes_onto_the_base_in_full(name):
    run = config(name, base_precision="nf4")
    base = kit.base(name)
    _, net = train.load(base, run, train.accelerator(run))
    hubs = model.new_adapter(base, run)
    assert model.apply_adapter(net, hubs) == model.adapter_hash(hubs)
    trained = model.adapter_of(net)
    model.check_adapter(trained, hubs)
    whole = model.load_net(base)
    model.add_adapter(whole, families.of(base), run)
    assert model.apply_adapter(whole, trained) == model.adapter_hash(trained)


def test_as_is_changes_no_number_and_no_layer():
    net = model.load_net(tiny.base())
    before = {name: type(module) for name, module in net.named_modules()}
    quantised.quantise(net, "as-is", torch.float32, CPU)
    assert {name: type(module) for name, module in net.named_modules()} == before
    assert RunConfig().base_precision == "as-is"


# --- its memory -------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_one_byte_or_0_53_a_coded_number_and_the_scales():
    """mini's UNet, float32: of each layer [out, in] in its blocks 4·out·in bytes become out·in + 4·out, or
    17/32·out·in.
    """
    base = tiny.ROOT / "models" / "mini"
    net = model.load_net(base)
    shapes = [net.get_submodule(layer).weight.shape for layer in quantised.layers(net)]
    numbers, outputs = sum(rows * columns for rows, columns in shapes), sum(rows for rows, _ in shapes)
    saved = {"int8": 3 * numbers - 4 * outputs, "nf4": 4 * numbers - numbers * 17 // 32}
    held = {}
    for kind in ("as-is", *KINDS):
        run = RunConfig(base_precision=kind)
        made = estimate._net(base, families.of(base), run, half=False)
        held[kind] = estimate._bytes(made.parameters())
    assert {kind: held["as-is"] - held[kind] for kind in KINDS} == saved
    assert numbers > 100_000


def test_the_estimate_of_a_coded_step_is_what_a_real_one_holds():
    """And on the way back no more than one layer is written out."""
    base, run = tiny.ROOT / "models" / "mini", RunConfig(base_precision="nf4", batch_size=8)
    objective, net = train.load(base, run, train.accelerator(run))
    for parameter in net.train().parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = estimate.Inputs(torch.randn(8, 4, 16, 16), torch.zeros(8), {"text": torch.randn(8, 24, 128)})
    empty = estimate.Inputs(
        inputs.latents.to("meta"), inputs.told.to("meta"), {"text": inputs.given["text"].to("meta")}
    )
    guessed = estimate.step_of(
        estimate._net(base, objective.family, run, half=False), objective.family, empty, half=False
    )
    assert estimate.step_of(net, objective.family, inputs, half=False) == pytest.approx(guessed, rel=0.003)


# --- why a site's weights are not offloaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_diffusers_offloading_of_layers_spoils_gradients_and_is_therefore_not_offered(tmp_path, checkpointing):
    """Its hooks bring weights for the way forward alone. The loss is right; on the way back, what was sent away is
    not there: here it is empty memory, which deterministic torch fills with NaN, on a GPU a tensor of the host.
    """
    run = config("flux", batch_size=4, gradient_checkpointing=checkpointing)
    rows, given = photos("flux").batch(torch.arange(4))

    def step(offload: bool) -> tuple[float, bool]:
        objective, net = train.load(kit.base("flux"), run, train.accelerator(run))
        if offload:
            folder = str(tmp_path / "away")
            net.enable_group_offload(CPU, CPU, offload_type="leaf_level", offload_to_disk_path=folder)
        loss = diffusion.noise_loss(net.train(), objective, rows, given, torch.Generator().manual_seed(3))
        loss.backward()
        return loss.item(), all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)

    torch.use_deterministic_algorithms(True)
    try:
        right, wrong = step(False), step(True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert right[0] == wrong[0] and (right[1], wrong[1]) == (True, False)


def test_and_by_block_with_checkpointing_every_block_is_on_the_card_when_it_ends(tmp_path):
    """What is computed again stops before the hook that takes the weights away: nothing would be saved."""
    run = config("flux", batch_size=4, gradient_checkpointing=True)
    rows, given = photos("flux").batch(torch.arange(4))
    torch.use_deterministic_algorithms(True)
    try:
        objective, net = train.load(kit.base("flux"), run, train.accelerator(run))
        net.enable_group_offload(
            CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "away")
        )
        blocks = [*net.transformer_blocks, *net.single_transformer_blocks]
        there = lambda: [all(p.isfinite().all() for p in block.parameters()) for block in blocks]  # noqa: E731
        loss = diffusion.noise_loss(net.train(), objective, rows, given, torch.Generator().manual_seed(3))
        assert not any(there())
        loss.backward()
        assert all(there())
    finally:
        torch.use_deterministic_algorithms(False)
