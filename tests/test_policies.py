"""Promises about the repository itself, kept by a machine: layers, contents of the bundle, settings told twice, no
pickles.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from app.codes import HEADLINES
from app.config import RunConfig, table
from bouquet import ROOT
from bouquet.hub.deployment import files as project_files

APP = sorted((ROOT / "app").rglob("*.py"))
PRODUCT = sorted((ROOT / "bouquet").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))

LAYERS = (  # each imports only from those above it: the order in which one reads the code
    {"text", "quiet", "codes"},
    {"errors", "rules"},
    {"config", "metrics", "files", "gpu", "unpacked", "settings", "audit", "bundle", "accountant"},
    {"images", "records"},
    {"limits", "captions", "seen", "views", "history", "wording"},
    {"tables"},
    {"folders", "noise"},
    {"data", "base"},
    {"sd", "flux", "flux2", "zimage"},
    {"sdxl", "sd3", "qwen"},
    {"families", "lora"},
    {"model", "bases", "diffusion", "lora_names", "quantised", "shelf"},
    {"masks"},
    {"cache", "wire", "journal", "privacy", "prior", "rate", "optimisers", "lora_files", "store"},
    {"factors", "budget"},
    {"dp"},
    {"train", "guard", "ema", "volume", "sample", "secrecy", "consent"},
    {"formats", "bounds", "spool", "gallery", "tracking"},
    {"products", "sites"},
    {"strategy", "attempt"},
    {"exchange"},
    {"sums"},
    {"client_app", "server_app"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def files() -> list[Path]:
    """Every file that git has or would take; in an archive's folder, which is none of git's, too."""
    return [path for name in project_files() if (path := ROOT / name).is_file()]


def is_python(path: Path) -> bool:
    return path.suffix == ".py" or path.read_bytes()[:40].partition(b"\n")[0].startswith(b"#!/usr/bin/env python")


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Dotted names that a module imports, anywhere or at its top level only."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    """A module's; a package's own, where it holds more than a sentence."""
    return path.parent.name if path.stem == "__init__" else path.stem


def own(path: Path) -> set[str]:
    """Modules of the app that a module of the app imports."""
    names = {name for name in imports(path) if name.startswith("app.")}
    inside = {name for name in names if name.startswith("app.families.")}
    parts = {part for name in names - inside for part in name.split(".")[1:]} | {name.split(".")[2] for name in inside}
    return parts & LEVEL.keys()


def outside(paths: list[Path], *packages: str) -> dict[str, set[str]]:
    """Which of these modules import from those packages, and what."""
    wanted = tuple(f"{package}." for package in packages)
    found = {
        str(path.relative_to(ROOT)): {name for name in imports(path) if f"{name}.".startswith(wanted)} for path in paths
    }
    return {path: names for path, names in found.items() if names}


def below(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


# --- layers -----------------------------------------------------------------------------------------------------------


def test_every_module_of_the_app_has_its_layer():
    assert {name_of(path) for path in APP} - {"app", "adapter", "hub", "photos", "site"} == LEVEL.keys()


@pytest.mark.parametrize("path", APP, ids=lambda path: path.stem)
def test_a_module_imports_only_from_lower_layers(path):
    wrong = [name for name in own(path) if LEVEL[name] >= LEVEL.get(name_of(path), 0)]
    assert wrong == []


def test_only_the_outermost_modules_the_aggregation_and_the_wire_know_flower():
    users = {path.stem for path in APP if any(name.split(".")[0] == "flwr" for name in imports(path))}
    assert users == {
        "client_app",
        "server_app",
        "exchange",
        "attempt",
        "sites",
        "bounds",
        "guard",
        "strategy",
        "wire",
        "bundle",
    }


SOON = (  # what only reads settings and folders
    "app/errors", "app/config", "app/site/limits", "app/site/gpu", "app/site/client_app", "app/site/photos/*",
    "bouquet/site/reach", "bouquet/site/preflight",
)  # fmt: skip


@pytest.mark.parametrize(
    "path", [path for name in SOON for path in sorted(ROOT.glob(f"{name}.py"))], ids=lambda path: path.stem
)
def test_what_only_reads_settings_and_folders_does_not_wait_for_torch(path):
    names = imports(path, everywhere=False)
    assert not {name.split(".")[0] for name in names} & {"torch", "diffusers", "peft", "transformers", "accelerate"}


# --- the house --------------------------------------------------------------------------------------------------------


def test_a_sites_half_never_imports_the_hubs_nor_the_hubs_a_sites():
    assert outside(below("app/site"), "app.hub", "bouquet.hub") == {}
    assert (
        outside(
            below("app/hub") + below("app/adapter") + sorted((ROOT / "app").glob("*.py")), "app.site", "bouquet.site"
        )
        == {}
    )
    assert outside(below("bouquet/site"), "app.hub", "bouquet.hub") == {}


def test_the_app_imports_nothing_but_itself_and_the_product_no_benchmark():
    assert outside(APP, "bouquet", "benchmarks", "scripts", "models", "tests", "docker") == {}
    named = {name for path in PRODUCT for name in imports(path) if name.startswith("models.mini.")}
    workshop = [file for name in sorted(named) if (file := ROOT / f"{name.replace('.', '/')}.py").exists()]
    assert len(workshop) > 2 and outside([*PRODUCT, *workshop], "benchmarks", "scripts", "tests", "docker") == {}
    assert outside(BENCHMARKS, "tests") == {}
    assert len(APP) > 30 and len(PRODUCT) > 40 and len(BENCHMARKS) > 40


def test_what_a_run_is_started_from_has_no_app_of_its_own_which_would_run_instead_of_the_signed_one():
    """The bundle's `app` is imported in these processes; one that is imported already would stay."""
    started = ["superexec", "serverapp", "supernode", "libraries"]
    code = "import sys; " + "; ".join(f"import bouquet.flower.{name}" for name in started)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(sorted(name for name in sys.modules if name.split('.')[0] == 'app'))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


SITTING = 400  # lines that one reads at a sitting


def test_no_module_of_the_app_or_the_product_is_longer_than_a_sitting():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in APP + PRODUCT}
    assert {name: count for name, count in lines.items() if count > SITTING} == {}


def tree() -> dict[str, set[str]]:
    """CONTRIBUTING's tree: by folder, the words that are said of it; deeper lines belong to the folder above them."""
    [block] = re.findall(r"^```\n(app/.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    open_folders: list[tuple[int, str]] = []
    told: dict[str, set[str]] = {}
    for line in block.splitlines():
        depth, first = len(line) - len(line.lstrip()), line.split()[0]
        while open_folders and open_folders[-1][0] >= depth:
            open_folders.pop()
        if first.endswith("/"):
            open_folders.append((depth, first.rstrip("/")))
        folder = "/".join(name for _, name in open_folders)
        told.setdefault(folder, set()).update(re.findall(r"\w+", line))
    return told


def test_the_tree_in_contributing_names_every_module_of_the_app_and_the_product_beside_its_folder():
    modules = [path.relative_to(ROOT) for path in APP + PRODUCT if not path.stem.startswith("__")]
    told = tree()
    assert [str(path) for path in modules if path.stem not in told.get(str(path.parent), ())] == []


# --- the bundle -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr 1.41 with pathspec 1.1
def test_the_bundle_holds_the_apps_code_and_nothing_of_a_sites_or_the_hubs(tmp_path):
    for name in ("app", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, tmp_path / name, ignore=ignored) if path.is_dir() else shutil.copy(path, tmp_path / name)
    for name in (
        "metadata.jsonl",
        "app/metadata.jsonl",
        "data/site-1/metadata.jsonl",
        "app/site-1/captions.json",
        "notes.md",
        ".env",
        "site-1.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"file_name": "anna.png", "text": "private"}\n')
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path))) as bundle:
        names = {name for name in bundle.namelist() if not name.startswith(".info/")}
        everything = b"".join(bundle.read(name) for name in bundle.namelist())
    assert names == {str(path.relative_to(ROOT)) for path in APP} | {"pyproject.toml"}
    assert b"anna.png" not in everything


# --- settings that stand in two places --------------------------------------------------------------------------------


def test_pyprojects_run_config_is_the_apps_defaults():
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    defaults = RunConfig()
    assert RunConfig.read(given) == defaults
    assert given == {name.replace("_", "-"): value for name, value in vars(defaults).items()}


def test_the_table_of_run_config_keys_is_the_apps():
    between = re.search(
        r"<!-- run-config -->\n(.*?)\n<!-- /run-config -->", (ROOT / "docs/run-config.md").read_text(), re.DOTALL
    )
    assert between.group(1).strip() == table()


@pytest.mark.parametrize("path", sorted((ROOT / "app" / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_a_preset_is_a_run_config(path):
    RunConfig.read(tomllib.loads(path.read_text()))


def test_the_preset_mini_is_the_defaults_and_sd15_is_stable_diffusion():
    read = lambda name: RunConfig.read(tomllib.loads((ROOT / "app" / "presets" / f"{name}.toml").read_text()))  # noqa: E731
    assert read("mini") == RunConfig()
    sd15 = read("sd15")
    assert (sd15.base_model, sd15.resolution, sd15.precision) == ("stable-diffusion-v1-5", 512, "bf16")


def test_every_direct_dependency_has_the_same_pin_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {line.split("#")[0].strip().lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    assert {re.sub(r"\[.*?\]", "", name).lower() for name in wanted} <= pins


SCRIPTS = [  # what prints codes without Python, or before it
    path
    for folder in ("scripts", "docker")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in {"", ".sh"}
]
CODE = re.compile(r"[A-Z]{3,}-\d\d")
FIELD = re.compile(r"\{(\w+)\}")


def calls(code: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call whose first argument is an error's code."""
    for node in ast.walk(code):
        match node:
            case ast.Call(args=[ast.Constant(value=str(first)), *_]) if CODE.fullmatch(first):
                yield first, node


def said() -> Iterator[tuple[str, str, str]]:
    """(code, sentence, where) of what tells one in its own words: the scripts, and what may not import `app`."""
    for path in SCRIPTS:
        told = re.findall(r"""(?:fail |printf ')([A-Z]{3,}-\d\d) [ \\\n]*"?([^"\\]+)["\\]""", path.read_text())
        yield from ((code, sentence, path.name) for code, sentence in told)
    for path in APP + PRODUCT:
        if path.stem == "codes":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Constant(value=str(text)) if found := re.match(r"([A-Z]{3,}-\d\d)  (.+)", text):
                    yield found[1], found[2], path.name
                case ast.Call(
                    func=ast.Name(id="Refusal") | ast.Attribute(attr="Refusal"), args=[ast.Constant(code), told, *_]
                ):
                    yield code, re.sub(r"\{.*?\}|…", "…", ast.unparse(told).strip("f'\"")), path.name


def raised() -> set[str]:
    """Codes that the code or a script tells."""
    python = [*APP, *PRODUCT, *BENCHMARKS, *below("docker")]
    return {code for path in python for code, _ in calls(ast.parse(path.read_text()))} | {code for code, *_ in said()}


def shown(headline: str) -> str:
    """As the docs have it, which know no facts."""
    return FIELD.sub("…", headline)


def test_every_code_is_raised_somewhere_and_every_raised_one_is_in_the_table():
    assert sorted(HEADLINES.keys() ^ raised()) == []


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docker/kit/README.md"])
def test_a_code_has_one_heading_in_the_docs_and_there_the_sentence_of_the_table(page):
    told = re.findall(r"^### ([A-Z]{3,}-\d\d)\n\n?\*\*(.+?)\*\*", (ROOT / page).read_text(), re.MULTILINE)
    codes = [code for code, _ in told]
    wanted = HEADLINES if page.startswith("docs") else {code for code in HEADLINES if code in codes}
    assert sorted(codes) == sorted(wanted)
    assert [(code, sentence) for code, sentence in told if sentence != shown(HEADLINES[code])] == []


def test_what_tells_a_code_in_its_own_words_says_the_sentence_of_the_table():
    told = list(said())
    assert len({where for *_, where in told}) > 9
    assert [(code, where) for code, sentence, where in told if sentence != shown(HEADLINES[code])] == []


def test_a_raise_gives_just_the_facts_that_its_sentence_has():
    wrong = []
    for path in [*APP, *PRODUCT, *BENCHMARKS]:
        for code, call in calls(ast.parse(path.read_text())):
            name = ast.unparse(call.func).split(".")[-1]
            if name.lower().endswith("error") or name in {"public", "_bouquet_error()"}:
                given = {word.arg for word in call.keywords} - {"found", "fix"}
                if len(call.args) > 1 or given != set(FIELD.findall(HEADLINES[code])):
                    wrong.append((path.name, call.lineno, code))
    assert wrong == []


# --- what is not in the repository ------------------------------------------------------------------------------------


def forbidden(tree: ast.AST) -> set[str]:
    """What runs code out of data, where a module uses it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {
                name
                for name in names
                if name.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
            }
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}
        ):
            found.add(f"torch.{node.attr}")
        if (
            isinstance(node, ast.keyword)
            and node.arg in {"trust_remote_code", "allow_pickle"}
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            found.add(node.arg)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            found.add(node.func.id)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(x)",
        "f(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_check_for_pickles_finds_them(line):
    assert forbidden(ast.parse(line))


def test_no_python_file_opens_a_pickle_or_runs_a_models_code():
    # the tests make hostile files
    sources = [path for path in files() if is_python(path) and path.relative_to(ROOT).parts[0] != "tests"]
    assert len(sources) > len(APP)
    assert {
        str(path.relative_to(ROOT)): found for path in sources if (found := forbidden(ast.parse(path.read_text())))
    } == {}


def text_files() -> dict[str, str]:
    pictures = {".png", ".jpg", ".safetensors", ".npy", ".parquet"}
    return {str(path.relative_to(ROOT)): path.read_text() for path in files() if path.suffix not in pictures}


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    # /root/.cache: pip's, in an image
    places = re.compile(r"(?<![\w.~}$*])/(?:root(?!/\.cache)|home/\w+|opt/wheels|work/\w)")
    assert {name: found for name, text in text_files().items() if (found := places.findall(text))} == {}


def test_the_development_data_are_named_by_tests_and_ci_alone():
    name = "/".join(("shared", "data"))
    assert [
        path for path, text in text_files().items() if name in text and not path.startswith(("tests/", ".ci/"))
    ] == []


def test_no_private_key_is_in_the_repository():
    begin = re.compile(r"^-----BEGIN [A-Z ]*PRIVATE KEY-----$", re.MULTILINE)
    assert [
        name for name, text in text_files().items() if begin.search(text) or name.endswith((".key", ".secret"))
    ] == []


def test_weights_are_safetensors_and_at_most_20_megabytes():
    assert [path.name for path in files() if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}] == []
    assert sum(path.stat().st_size for path in files() if path.suffix == ".safetensors") <= 20_000_000


def test_python_is_the_one_the_project_names():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=3.11" and sys.version_info >= (3, 11)


def test_tests_at_work_side_by_side_share_the_processors():
    """OpenMP counts its threads when torch is imported: with one a core in each worker the suite took twice as long."""
    if "PYTEST_XDIST_WORKER_COUNT" not in os.environ:
        pytest.skip("one worker")
    import torch

    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
