"""What the README says is so: every command is executed by a named test, the snippet runs as printed, every link leads
to a file.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_project, sh
from PIL import Image
from test_partition import data_set, jpeg_or_png

from app import model
from app.adapter import formats
from app.config import RunConfig
from app.families import sd
from app.site.client_app import FOLDERS
from app.site.photos.data import scan
from bouquet import ROOT
from bouquet.hub.deployment import Processes, free_port
from bouquet.hub.runs import connect

README = (ROOT / "README.md").read_text()
PAGES = "".join(
    (ROOT / page).read_text()
    for page in ("docs/simulation.md", "docs/run-config.md", "docs/troubleshooting.md", "CONTRIBUTING.md")
)
BASE = ROOT / "models" / "mini"
CERTS, COMPOSE, FEDERATION, JOIN, REPORT, SIMULATION, TRUST, WORTH, HERE = (
    f"tests/test_{name}.py"
    for name in ("certs", "compose", "federation", "join", "report", "simulation", "trust", "worth", "readme")
)
DEMO = f"{FEDERATION}::test_the_demo_goes_from_a_fresh_copy_to_the_adapter_and_stops_what_it_started"
BY_HAND = f"{COMPOSE}::test_a_run_by_hand_leaves_its_adapter_on_the_shared_volume"
DOWN = f"{COMPOSE}::test_down_keeps_adapters_and_a_second_up_continues_with_the_same_certificates_and_sites"
BACK = f"{COMPOSE}::test_a_hub_goes_back_to_the_database_that_it_had_before_an_upgrade"
SCRIPTS_TEST = f"{HERE}::test_scripts_test_runs_the_tests_it_is_asked_for"
PRESET = f"{HERE}::test_the_preset_reaches_the_hub_and_flwr_ls_tells_the_runs_real_end"
BEFORE_PYTHON = "tests/test_cli.py::test_the_doctor_and_the_demo_are_the_programs_that_work_before_python_is_there"
SIMULATED = f"{SIMULATION}::test_the_app_runs_in_simulation_as_it_is"
STOPPED = f"{SIMULATION}::test_nothing_runs_on_after_the_local_superlink_is_stopped_by_its_pid"

# what a person types: the test that executes it, and the words by which that test's file shows it; of `bouquet` maybe
# by the name that a command had before, which tests/test_cli.py holds to be the same
COMMANDS = {
    "scripts/demo": (DEMO, "scripts/demo"),
    "scripts/demo --engine process": (DEMO, "scripts/demo --engine process"),
    "scripts/demo --clean": (
        "tests/test_doctor.py::test_clean_removes_what_the_clone_has_made_and_no_key", "scripts/demo --clean"),
    "scripts/demo --clean --yes": (
        "tests/test_doctor.py::test_clean_removes_what_the_clone_has_made_and_no_key", "scripts/demo --clean --yes"),
    "scripts/doctor": (
        "tests/test_doctor.py::test_the_doctor_needs_no_packages_changes_nothing_and_ends_with_a_verdict",
        "scripts/doctor"),
    "scripts/check": (
        "tests/test_checks.py::test_what_is_wrong_is_named_and_each_check_is_made_whatever_the_others_find",
        "scripts/check"),
    "scripts/test": (SCRIPTS_TEST, "scripts/test"),
    'scripts/test -m "not slow"': (SCRIPTS_TEST, '-m "not slow"'),
    "scripts/test tests/test_records.py": (SCRIPTS_TEST, "scripts/test tests/test_records.py"),
    "scripts/setup": (BY_HAND, "scripts/setup"),
    "docker compose up -d --wait": (BY_HAND, "docker compose up -d --wait"),
    "docker compose up -d": (DOWN, "docker compose up -d"),
    ".venv/bin/flwr run . remote-deployment --stream": (BY_HAND, ".venv/bin/flwr run . remote-deployment"),
    ".venv/bin/flwr ls remote-deployment": (PRESET, ".venv/bin/flwr ls remote-deployment"),
    "docker compose run --rm operator flwr ls remote-deployment": (
        f"{COMPOSE}::test_the_operator_needs_no_python_on_the_host",
        "docker compose run --rm operator flwr ls remote-deployment"),
    "docker compose cp serverapp:/adapters ./adapters": (BY_HAND, "docker compose cp serverapp:/adapters ./adapters"),
    "docker compose logs": (DOWN, "docker compose logs"),
    "docker compose logs supernode-1": (BY_HAND, "docker compose logs supernode-1"),
    "docker compose --profile dashboard up -d --wait page": (
        f"{COMPOSE}::test_the_hubs_page_shows_its_sites_and_runs_on_this_hosts_loopback_alone_and_may_only_read",
        "--profile dashboard up -d --wait page"),
    "docker compose up": (DOWN, "docker compose up"),
    "docker compose stop superlink": (BACK, "docker compose stop superlink"),
    "docker compose run --rm --no-deps -T -w /state superlink sh -c 'mv superlink.db superlink.db.newer && cp superlink.db.before-* superlink.db'": (  # noqa: E501
        BACK, "mv superlink.db superlink.db.newer && cp superlink.db.before-* superlink.db"),
    "docker compose up -d --wait gateway serverapp": (BACK, "docker compose up -d --wait gateway serverapp"),
    "docker compose ps serverapp": (BACK, "docker compose ps serverapp"),
    "docker compose logs superlink": (BACK, "docker compose logs superlink"),
    "docker compose ps -a": (BY_HAND, "docker compose ps -a"),
    "docker compose down": (DOWN, "docker compose down"),
    "scripts/certs": (f"{CERTS}::test_the_server_certificate_has_the_names_that_are_used", 'sh("scripts/certs"'),
    "scripts/certs check": (
        f"{CERTS}::test_a_missing_name_is_named_and_making_again_adds_it_with_the_same_ca", "scripts/certs check"),
    "scripts/certs renew": (
        f"{CERTS}::test_an_expired_certificate_is_named_and_renewed_with_the_same_ca", "scripts/certs renew"),
    "scripts/setup packages": (SCRIPTS_TEST, "scripts/test"),  # which begins with it
    "bouquet hub sign": (
        f"{TRUST}::test_by_plain_flwr_run_both_sites_run_a_signed_checkout_and_an_older_one_only_signed_again",
        "scripts/bouquet hub sign"),
    "bouquet hub sign --again": (
        f"{TRUST}::test_by_plain_flwr_run_both_sites_run_a_signed_checkout_and_an_older_one_only_signed_again",
        "scripts/bouquet hub sign --again"),
    "bouquet hub sign --key FILE": (
        f"{TRUST}::test_the_command_shows_the_fingerprint_that_ssh_keygen_shows", "scripts/bouquet hub sign --key"),
    "bouquet hub admit NAME NAME.pub": (
        f"{JOIN}::test_admitting_the_same_key_under_the_same_name_again_changes_nothing",
        "scripts/bouquet hub admit garden"),
    "bouquet hub sites": (f"{JOIN}::test_an_admitted_site_is_online_by_name", "scripts/bouquet hub sites"),
    "scripts/bench accept": (
        "tests/test_accept.py::test_the_dry_run_goes_through_every_check_and_leaves_nothing_behind",
        '"scripts/bench", "accept"'),
    "scripts/faults --only PATTERN --list": (
        "tests/test_faults.py::test_the_command_lists_the_cases_that_a_pattern_names", "scripts/faults --only"),
    "scripts/access": (
        "tests/test_access.py::test_nothing_gets_through_the_hub_and_as_much_as_the_page_says_through_flowers_quickstart",
        "scripts/access"),
    "bouquet hub status": (
        "tests/test_status.py::test_a_running_run_ends_with_3_and_no_run_with_1", "scripts/bouquet hub status"),
    "bouquet report": (
        f"{REPORT}::test_the_command_writes_the_page_into_the_last_runs_folder",
        'sh("scripts/bouquet report"'),
    "bouquet run": (
        "tests/test_federation.py::test_a_run_that_misses_sites_fails_by_name_within_its_bound",
        "scripts/bouquet run --run-config"),
    "bouquet report --out FILE": (
        f"{REPORT}::test_the_command_takes_an_id_or_a_folder_and_writes_where_it_is_told",
        "scripts/bouquet report {folder} --out"),
    "bouquet measure membership": (
        "tests/test_membership.py::test_a_sites_file_has_numbers_alone_of_the_photos_that_its_run_trained_on",
        '"measure", "membership"'),
    "bouquet worth": (
        f"{WORTH}::test_measured_at_two_sites_and_collected_at_the_hub_the_report_has_a_sentence_a_site",
        "scripts/bouquet worth measure"),
    "scripts/add-site 3 --data DIR": (
        f"{COMPOSE}::test_a_third_site_is_one_command_and_trains_with_the_others", "scripts/add-site 3 --data"),
    ".venv/bin/flwr run . remote-deployment --run-config app/presets/sd15.toml --stream": (
        PRESET, "--run-config app/presets/sd15.toml --stream"),
    ".venv/bin/bouquet data partition --dataset <name or folder> --sites 2 --out .bouquet/flowers": (
        f"{HERE}::test_the_partition_command_divides_a_folder_of_parquet", "<name or folder>"),
    "bouquet data class-images": (
        "tests/test_prior.py::test_the_base_model_draws_a_folder_of_them_that_a_site_reads_and_writes_into_no_other",
        '"data", "class-images"'),
    "bouquet data partition": (
        f"{HERE}::test_the_partition_command_divides_a_folder_of_parquet", "bouquet data partition"),
    "bouquet doctor": (BEFORE_PYTHON, "scripts/bouquet doctor"),
    "bouquet demo": (BEFORE_PYTHON, "scripts/bouquet demo"),
    "bouquet --help": (
        "tests/test_cli.py::test_nothing_asked_is_wrong_use_and_shows_what_there_is", "cli.main([])"),
    "docker/install .venv cpu simulation": (
        f"{HERE}::test_what_the_simulation_adds_is_locked", "docker/install .venv cpu simulation"),
    ". .venv/bin/activate": (SIMULATED, '"PATH": f"{BIN}'),
    "export BOUQUET_DATA=$PWD/.bouquet/data BOUQUET_MODELS=$PWD/models BOUQUET_CACHE=$PWD/.bouquet/cache BOUQUET_ADAPTERS=$PWD/.bouquet/adapters": (  # noqa: E501
        f"{HERE}::test_the_simulation_is_given_every_folder_it_needs", "FOLDERS"),
    "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1": (
        SIMULATED, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"),
    "mkdir -p .bouquet/adapters": (SIMULATED, '"adapters").mkdir'),
    "flwr run . local --stream": (SIMULATED, '"run", str(ROOT), "local"'),
    'pkill -f "flower-superlink --insecure --simulation"': (STOPPED, '"flower-superlink --insecure --simulation"'),
}  # fmt: skip


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> set[str]:
    """Every line of the sh blocks without its comment, and what the texts name of scripts, `bouquet`, Compose."""
    lines = "\n".join(blocks("sh", README + PAGES)).replace("\\\n", " ").splitlines()
    typed = {" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines}
    text = re.sub(r"```.*?```", "", README + PAGES, flags=re.DOTALL)
    named = {
        " ".join(command.split()) for command in re.findall(r"`((?:scripts/|bouquet |docker compose )[^`]+)`", text)
    }
    return (typed | named) - {"", "scripts/*"}


# --- the commands ------------------------------------------------------------------------------------------------


def test_every_command_has_a_test_that_executes_it() -> None:
    assert commands() - COMMANDS.keys() == set(), "in the README, but no test is named for it here"
    assert COMMANDS.keys() - commands() == set(), "here, but no longer in the README"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_named_test_exists_and_shows_the_command(command: str) -> None:
    (file, test), words = COMMANDS[command][0].split("::"), COMMANDS[command][1]
    source = (ROOT / file).read_text()
    assert test in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert words in (source.split("\n\n\n", 1)[1] if file == HERE else source)  # here, the table itself does not count


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("readme") / "bouquet")


@pytest.mark.slow
def test_scripts_test_runs_the_tests_it_is_asked_for(copy: Path) -> None:
    shown = sh('scripts/test tests/test_records.py -m "not slow"', copy).stdout
    asked = re.search(r"\d workers \[(\d+) items\]", shown)[1]
    assert 10 < int(asked) < 100 and re.search(rf"{asked} passed", shown)  # those of one file alone


def test_the_partition_command_divides_a_folder_of_parquet(copy: Path, tmp_path: Path) -> None:
    flowers = data_set(
        tmp_path / "flowers", [jpeg_or_png(number) for number in range(12)], label=[number // 3 for number in range(12)]
    )
    [command] = [line for line in commands() if "bouquet data partition --dataset" in line]
    sh(command.replace("<name or folder>", str(flowers)), copy)
    photos = [scan(copy / ".bouquet/flowers" / site).photos for site in ("site-1", "site-2")]
    assert [len(part) for part in photos] == [6, 6]
    assert {photo.caption for part in photos for photo in part} >= {
        "a photo of a tiger lily",
        "a photo of a corn poppy",
    }


@pytest.mark.slow
def test_the_preset_reaches_the_hub_and_flwr_ls_tells_the_runs_real_end(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub without sites, base models or a network names what the preset asks for. `--stream` ends with 0 all the
    same.
    """
    sh("scripts/certs", copy)
    (tmp_path / "models").mkdir()
    env = {"BOUQUET_MODELS": str(tmp_path / "models"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    hub = Processes(tmp_path / "hub", copy / "certs", free_port(), {}, env)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "operator"))
    connect(hub.address, copy / "certs/ca.crt")
    try:
        hub.start_hub()
        shown = sh(".venv/bin/flwr run . remote-deployment --run-config app/presets/sd15.toml --stream", copy).stdout
        assert "MODEL-02" in shown and str(tmp_path / "models/stable-diffusion-v1-5") in shown
        assert "finished:failed" in sh(".venv/bin/flwr ls remote-deployment", copy, COLUMNS="300").stdout
    finally:
        hub.stop()


# --- the simulation ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_simulation_adds_is_locked(tmp_path: Path) -> None:
    """pip is asked what it would install, and installs nothing."""
    report, env = tmp_path / "report.json", {"PIP_DRY_RUN": "1", "PIP_REPORT": str(tmp_path / "report.json")}
    done = sh("docker/install .venv cpu simulation", ROOT, check=False, **env)
    if done.returncode and re.search(r"Connection|Temporary failure|No matching distribution", done.stdout):
        pytest.skip(f"pip reaches no package index: {done.stdout.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout
    locked = {line.lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    added = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    assert {f"{item['name'].lower().replace('_', '-')}=={item['version']}" for item in added} <= locked
    assert [line for line in locked if line.startswith("ray==")]


def test_the_simulation_is_given_every_folder_it_needs() -> None:
    [line] = [command for command in commands() if command.startswith("export BOUQUET_DATA")]
    assert set(re.findall(r"(\w+)=", line)) == {*FOLDERS, "BOUQUET_ADAPTERS"}


# --- the model user's snippet --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's final folder with a small adapter of random numbers on models/mini."""
    config, generator = RunConfig.read({"lora-rank": 2}), torch.Generator().manual_seed(1)
    adapter = {
        key: torch.randn(value.shape, generator=generator) * 0.2
        for key, value in model.new_adapter(BASE, config).items()
    }
    return formats.write_final(tmp_path_factory.mktemp("run"), adapter, config, sd.FAMILY)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The pipeline takes 2 steps from one seed; pictures land in the folder that is returned."""
    from diffusers import StableDiffusionPipeline as Pipeline

    def call(self, *args, _full=Pipeline.__call__, **kwargs):
        return _full(self, *args, num_inference_steps=2, generator=torch.Generator().manual_seed(3), **kwargs)

    monkeypatch.setattr(Pipeline, "__call__", call)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(code: str, file: Path) -> np.ndarray:
    """Run the code and read the picture it saves, as whole numbers (64, 64, 3)."""
    file.unlink(missing_ok=True)
    exec(compile(code, "README.md", "exec"), {})
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_the_snippet_draws_with_the_adapter_that_a_run_leaves(final: Path, quick: Path) -> None:
    [printed] = blocks("python")
    snippet = printed.replace("models/mini", str(BASE)).replace(".bouquet/adapters/latest/final", str(final))
    base = "\n".join(line for line in snippet.splitlines() if "load_lora_weights" not in line)
    assert str(BASE) in snippet and str(final) in snippet and base != snippet
    drawn, plain = picture(snippet, quick / "poppy.png"), picture(base, quick / "poppy.png")
    assert drawn.shape == plain.shape == (64, 64, 3)
    assert np.abs(drawn - plain).mean() > 1
    assert np.array_equal(plain, picture(base, quick / "poppy.png"))  # so that the difference is the adapter's


def test_the_same_folder_is_a_peft_adapter_and_draws_the_same(final: Path, quick: Path) -> None:
    [printed] = blocks("python")
    [peft] = re.findall(r"`(PeftModel\.from_pretrained\(.*?\))`", README)
    with_peft = re.sub(
        r"^pipe\.load_lora_weights\(.*\)$", f"from peft import PeftModel\n{peft}", printed, flags=re.MULTILINE
    )
    pictures = [
        picture(
            code.replace("models/mini", str(BASE)).replace(".bouquet/adapters/latest/final", str(final)),
            quick / "poppy.png",
        )
        for code in (printed, with_peft)
    ]
    assert "PeftModel" in with_peft and np.abs(pictures[0] - pictures[1]).max() <= 1


# --- the links -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", ["README.md", "models/mini/README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_leads_to_a_file_of_the_project(page: str) -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).is_file()] == []
