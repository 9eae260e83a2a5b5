"""NVIDIA GPUs without one: nvidia-ml-py talks to a stand-in of the driver's library, compiled here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.site.gpu import NO_GPU, Driver, GpuError, Meter, check_driver, check_pin, devices, pinned, visible
from bouquet import ROOT
from tests.kit.memory import Federation
from tests.kit.nvml import A10, T4, StandIn, gpu, library
from tests.kit.wait import until

MIB = 2**20


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path, monkeypatch)


def test_a_gpu_is_read_through_the_drivers_library(nvml: StandIn) -> None:
    nvml.state(gpu("GPU-1", total=1000, free=400, processes="71:500,72:90"), driver="570.86.10 12080")
    driver, [device] = devices()
    assert driver == Driver("570.86.10", (12, 8))
    assert (device.uuid, device.name, device.total, device.free) == ("GPU-1", "NVIDIA A10", 1000 * MIB, 400 * MIB)
    assert device.processes == {71: 500 * MIB, 72: 90 * MIB}


def test_the_library_is_found_where_the_system_looks_for_libraries(tmp_path: Path) -> None:
    (tmp_path / "state").write_text(f"580.95.05 13000\n{A10}\n")
    env = os.environ | {
        "LD_LIBRARY_PATH": str(library().parent),
        "NVML_STATE": str(tmp_path / "state"),
        "CUDA_VISIBLE_DEVICES": "0",
    }
    shown = subprocess.run(
        [sys.executable, "-c", "from app.site import gpu; print(gpu.devices()[1][0].name)"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "NVIDIA A10\n", shown.stderr


def test_without_a_driver_a_person_is_told_what_to_install(nvml: StandIn) -> None:
    with pytest.raises(GpuError, match="GPU-01") as caught:
        devices()
    assert "Driver Not Loaded" in caught.value.found and "nvidia-container-toolkit" in caught.value.fix


# --- the pin
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", ["1", "GPU-bbbb2222"])
def test_of_two_gpus_the_pinned_one_is_left_when_cuda_sees_no_other(
    nvml: StandIn, monkeypatch: pytest.MonkeyPatch, pin: str
) -> None:
    nvml.state(A10, T4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", pin)
    assert pinned(pin, devices()[1]).name == "Tesla T4"


def test_a_second_visible_gpu_is_refused_though_the_pinned_one_is_there(nvml: StandIn) -> None:
    nvml.state(A10, T4)
    with pytest.raises(GpuError, match="GPU-03") as caught:
        pinned("GPU-bbbb2222", devices()[1])
    assert "NVIDIA A10 GPU-aaaa1111" in caught.value.found and "Tesla T4 GPU-bbbb2222" in caught.value.found


def test_a_wrong_uuid_is_refused_and_the_right_ones_are_shown(nvml: StandIn) -> None:
    nvml.state(A10)
    with pytest.raises(GpuError, match="GPU-02") as caught:
        pinned("GPU-cccc3333", devices()[1])
    assert caught.value.found == "SITE_GPU=GPU-cccc3333; visible: NVIDIA A10 GPU-aaaa1111-0000-0000-0000-000000000001"
    assert "aaaa1111" not in str(caught.value)  # the public sentence names no device


@pytest.mark.parametrize("pin", ["0,1", "0, 1", "0 1", "0;1", "GPU-aaaa1111,GPU-bbbb2222", "0,", "all,0"])
def test_a_pin_of_several_gpus_is_refused_and_says_what_to_do_instead(pin: str) -> None:
    with pytest.raises(GpuError, match="GPU-06  A site trains on one GPU.") as caught:
        check_pin(pin)
    assert (
        caught.value.found == f"SITE_GPU={pin}"
        and "scripts/add-site" in caught.value.fix
        and "invitation" in caught.value.fix
    )


@pytest.mark.parametrize(
    "pin",
    [
        "",
        "0",
        "17",
        " 1 ",
        "all",
        "GPU-aaaa1111-0000-0000-0000-000000000001",
        "MIG-aaaa1111-0000-0000-0000-000000000001",
        "MIG-GPU-aaaa1111/7/0",
    ],
)
def test_a_pin_of_one_gpu_is_taken(pin: str) -> None:
    check_pin(pin)


@pytest.mark.parametrize("pin", ["nonsense", "gpu0", "-1", "GPU-"])
def test_a_pin_that_is_none_is_refused_though_one_gpu_is_visible(nvml: StandIn, pin: str) -> None:
    nvml.state(A10)
    with pytest.raises(GpuError, match="GPU-02") as caught:
        pinned(pin, devices()[1])
    assert caught.value.found.startswith(f"SITE_GPU={pin}; visible: NVIDIA A10 GPU-aaaa1111")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-b", [1]),
        ("", []),
        ("-1", []),
        ("1,9,0", [1]),
        ("GPU-x,0", []),
    ],
)
def test_cuda_visible_devices_narrows_nvmls_list_as_cuda_does(value: str | None, expected: list[int]) -> None:
    env = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert visible(["GPU-a", "GPU-b", "GPU-c"], env) == expected


# --- the driver
# --------------------------------------------------------------------------------------------------------


def test_a_driver_for_an_older_major_version_of_cuda_is_too_old() -> None:
    with pytest.raises(GpuError, match="GPU-04") as caught:
        check_driver(Driver("535.183.01", (12, 2)), "13.0")
    assert caught.value.found == "driver 535.183.01 runs CUDA up to 12.2; this torch is built for CUDA 13.0"


@pytest.mark.parametrize(
    ("cuda", "remark"), [((12, 8), ""), ((12, 10), ""), ((13, 0), ""), ((12, 4), "CUDA 12.8 on a driver for 12.4")]
)
def test_within_a_major_version_an_older_driver_works_with_a_remark(cuda: tuple[int, int], remark: str) -> None:
    assert check_driver(Driver("x", cuda), "12.8") == remark


def test_a_torch_made_for_the_cpu_is_named_where_a_gpu_is_pinned() -> None:
    with pytest.raises(GpuError, match="GPU-04  The NVIDIA driver and this image's torch do not fit each other."):
        check_driver(Driver("x", (13, 0)), None)


# --- the meter
# ---------------------------------------------------------------------------------------------------------


def test_joules_are_the_difference_of_the_millijoule_counter(nvml: StandIn) -> None:
    nvml.state(gpu(energy=1_000_000))
    with Meter(interval=60) as meter:
        nvml.state(gpu(energy=1_045_500))
    assert meter.numbers()["gpu-joules"] == 45.5


def test_utilisation_is_the_mean_and_memory_the_peak_of_what_was_seen(nvml: StandIn) -> None:
    nvml.state(gpu(busy=20, total=1000, free=300))
    with Meter(interval=0.01) as meter:
        wait(lambda: len(meter.busy) >= 2)
        nvml.state(gpu(busy=80, total=1000, free=900))
        wait(lambda: 80 in meter.busy)
    twenties, eighties = meter.busy.count(20), meter.busy.count(80)
    assert twenties + eighties == len(meter.busy)
    assert meter.numbers()["gpu-utilisation"] == round((20 * twenties + 80 * eighties) / (twenties + eighties), 1)
    assert meter.numbers()["gpu-peak-mib"] == 700  # 1000 − 300, though 100 at the end


def test_even_the_shortest_work_is_looked_at_once(nvml: StandIn) -> None:
    nvml.state(gpu(busy=37))
    with Meter(interval=60) as meter:
        pass
    assert meter.busy == [37] and meter.name == "NVIDIA A10"


def test_what_a_gpu_cannot_say_is_left_out(nvml: StandIn) -> None:
    nvml.state(gpu(busy=-1, energy=-1, total=10, free=4))
    with Meter(interval=60) as meter:
        pass
    assert meter.numbers() == {"gpu-peak-mib": 6}


def test_a_counter_that_starts_anew_gives_no_joules(nvml: StandIn) -> None:
    nvml.state(gpu(energy=5000))
    with Meter(interval=60) as meter:
        nvml.state(gpu(energy=10))
    assert "gpu-joules" not in meter.numbers()


def test_a_gpu_that_falls_silent_does_not_end_the_work(nvml: StandIn) -> None:
    nvml.state(gpu(busy=50, energy=1))
    with Meter(interval=0.01) as meter:
        wait(lambda: meter.busy)
        nvml.file.unlink()
    assert meter.numbers()["gpu-utilisation"] == 50 and "gpu-joules" not in meter.numbers()


def test_without_nvidia_the_work_goes_on_and_says_no_gpu(nvml: StandIn) -> None:
    with Meter() as meter:
        worked = True
    assert worked and meter.name == NO_GPU and meter.numbers() == {}


def test_a_site_that_hid_its_gpus_from_cuda_measures_none(nvml: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.state(A10)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Meter() as meter:
        pass
    assert meter.name == NO_GPU and meter.numbers() == {}


def wait(what) -> None:
    until(what, every=0.005)


# --- a round's numbers
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_rounds_gpu_and_its_numbers_reach_the_hubs_history(
    nvml: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    if has_gpu:
        nvml.state(gpu(busy=50, energy=9000, total=1000, free=250))
    federation = Federation(tmp_path, rounds=1, sample_prompts="")
    federation.go(monkeypatch)
    told = federation.history()["rounds"][0]["sites"]["site-1"]
    numbers = {key: value for key, value in told.items() if key.startswith("gpu")}
    measured = {"gpu": "NVIDIA A10", "gpu-peak-mib": 750, "gpu-utilisation": 50, "gpu-joules": 0}
    assert numbers == (measured if has_gpu else {"gpu": NO_GPU})
    assert told["seconds-train"] > 0
