"""Every place where Bouquet leans on Flower's insides is as it takes it, and none can stop to fit without a word."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import threading
import types
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from app.errors import BouquetError
from bouquet import ROOT
from bouquet.flower import contracts, relied, seams
from bouquet.flower.contracts import called_with, in_order, says, uses_only
from bouquet.hub import control
from bouquet.site import reach
from tests.kit.wait import PATIENT

ALL = seams.declared()
OURS = {name: seam for name, seam in ALL.items() if seam.ours}
FUNCTIONS = {name: seam for name, seam in OURS.items() if seam.takes is not None}
WRITTEN_THERE = {
    name: seam for name, seam in FUNCTIONS.items() if not seam.home and "." not in seam.place.partition(":")[2]
}


def each(of: dict[str, seams.Seam]) -> Any:
    return pytest.mark.parametrize("seam", of.values(), ids=of.keys())


def restored(seam: seams.Seam, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str, Any]:
    """Who has it, its name, and what is there, which comes back after the test."""
    owner, name = contracts._owner(seam.place)
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, own)
    return owner, name, own


def other(own: Any) -> Any:
    """Something else, called as this is."""
    return wraps(own)(lambda *_, **__: None) if callable(own) else types.SimpleNamespace()


def refused(seam: seams.Seam, step=lambda seam: seams.take(seam, other)) -> str:
    with pytest.raises(BouquetError) as error:
        step(seam)
    assert (
        error.value.code == "FLWR-01"
        and seam.place in error.value.found
        and f"flwr {contracts.FITS}" in error.value.fix
    )
    assert seam.place not in str(error.value)
    return error.value.found


def test_flower_is_as_every_seam_takes_it():
    assert seams.check() == {}


def test_what_we_write_out_of_flowers_is_what_the_seams_say():
    between = re.search(r"\^POST /v1/fleet/\(([a-z|-]+)\)\$", (ROOT / "docker/gateway.conf").read_text())
    assert sorted(between.group(1).split("|")) == sorted({*relied.CALLS.split()} - {"register-node", "unregister-node"})
    assert re.search(r"^LONGEST = 75$", (ROOT / "docker/health.py").read_text(), re.MULTILINE)  # 2.5 of 30 s
    assert control.IN_USE == "[code: 23]"
    assert (reach.BEHIND, reach.AHEAD) == (300, 5)


def test_the_version_that_fits_is_the_locked_one():
    assert f"flwr=={contracts.FITS}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_each_seam_says_why_it_is_there_and_what_would_end_it():
    assert [name for name, seam in ALL.items() if not (seam.why and seam.instead)] == []


def test_the_command_says_what_holds_and_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "bouquet.flower.seams"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENT
    )
    assert done.returncode == 0 and done.stdout.split() == [word for name in ALL for word in ("ok", name)]


# --- none fails silently ---------------------------------------------------------------------------------------------


@each(ALL)
def test_a_name_that_flower_no_longer_has_is_told(seam, monkeypatch):
    name, real = seam.place.rpartition(":")[2].rpartition(".")[2], contracts.tree

    def renamed(module: str) -> ast.AST:
        return ast.parse(re.sub(rf"\b{name}\b", f"{name}_2", ast.unparse(real(module))))

    monkeypatch.setattr(contracts, "tree", renamed)
    assert any(f"no {name}" in problem for problem in contracts.wrong(seam))
    refused(seam, seams.hold)
    if seam.ours:
        refused(seam)


@each({name: seam for name, seam in ALL.items() if seam.takes is not None})
def test_a_function_that_takes_something_else_by_its_source_is_told(seam, monkeypatch):
    real, home = contracts.tree, seam.home or seam.place
    name = home.rpartition(":")[2].rpartition(".")[2]

    def widened(module: str) -> ast.AST:
        return ast.parse(
            re.sub(rf"(def {name}\()", r"\1first, ", ast.unparse(real(module))).replace("first, )", "first)")
        )

    monkeypatch.setattr(contracts, "tree", widened)
    assert any("takes first" in problem for problem in contracts.wrong(seam))


@pytest.mark.parametrize(
    "gone",
    sorted(
        {(name, (place or seam.place).partition(":")[0]) for name, seam in ALL.items() for _, place, _ in seam.facts}
    ),
    ids=" ".join,
)
def test_a_module_that_a_seam_takes_for_granted_and_is_gone_is_told(gone, monkeypatch):
    (name, module), real = gone, contracts.tree

    def without(wanted: str) -> ast.AST:
        if wanted == module:
            raise contracts.Gone(f"no module {module}")
        return real(wanted)

    monkeypatch.setattr(contracts, "tree", without)
    assert any(f"no module {module}" in problem for problem in contracts.wrong(ALL[name]))


@each(OURS)
def test_each_of_ours_is_put_in_and_seen(seam, monkeypatch):
    owner, name, own = restored(seam, monkeypatch)
    new = seams.take(seam, other)
    assert getattr(owner, name) is new is not own


@each(OURS)
def test_what_is_not_there_when_it_is_replaced_is_told(seam, monkeypatch):
    owner, name = contracts._owner(seam.home if "." in seam.place.partition(":")[2] and seam.home else seam.place)
    monkeypatch.delattr(owner, name)
    refused(seam)


@each(FUNCTIONS)
def test_a_function_that_takes_something_else_when_it_is_replaced_is_told(seam, monkeypatch):
    owner, name, _ = restored(seam, monkeypatch)
    setattr(owner, name, lambda another: None)
    assert "takes another" in refused(seam)


def looked_up(seam: seams.Seam) -> list[tuple[str, list[str]]]:
    """Functions that find it in a module's names, and how."""
    found = []
    for place, spelled in seam.seen:
        owner, name = contracts._owner(place)
        if spelled.split(".")[0] in getattr(getattr(owner, name), "__globals__", {}):
            found.append((place, spelled.split(".")))
    return found


@each({name: seam for name, seam in OURS.items() if looked_up(seam)})
def test_a_user_that_keeps_flowers_own_is_told(seam, monkeypatch):
    owner, name, own = restored(seam, monkeypatch)
    [(place, [first, *rest]), *_] = looked_up(seam)
    user, called = contracts._owner(place)
    function = getattr(user, called)
    kept = function.__globals__ | {first: own if first == name else types.SimpleNamespace(**dict.fromkeys(rest, own))}
    monkeypatch.setattr(user, called, types.FunctionType(function.__code__, kept, called))
    assert f"{place} does not see ours" in refused(seam)


@each({name: seam for name, seam in OURS.items() if seam.seen})
def test_a_user_that_no_longer_looks_it_up_is_told(seam, monkeypatch):
    restored(seam, monkeypatch)
    [(place, _), *_] = seam.seen
    monkeypatch.setattr(*contracts._owner(place), lambda *_, **__: None)
    assert f"{place} does not see ours" in refused(seam)


def test_only_what_a_local_name_leads_to_is_left_to_the_source_alone():
    assert {name for name, seam in OURS.items() if not looked_up(seam)} == {
        "ACTIVATE",
        "ANSWERS",
        "TASK_TYPES",
        "LAUNCH_TASK",
        "RECONCILE",
        "FINISH_TASK",
    }


@each(WRITTEN_THERE)
def test_a_module_that_has_it_by_name_is_told(seam, monkeypatch):
    _, name, own = restored(seam, monkeypatch)
    module = types.ModuleType("flwr.another")
    setattr(module, name, own)
    monkeypatch.setitem(sys.modules, "flwr.another", module)
    assert "flwr.another has it by name" in refused(seam)


@each(WRITTEN_THERE)
def test_a_file_that_imports_it_by_name_is_told(seam, monkeypatch, tmp_path):
    module, _, name = seam.place.partition(":")
    (tmp_path / "one.py").write_text(f"from .{module.rpartition('.')[2]} import (\n    first,\n    {name},\n)\n")
    (tmp_path / "two.py").write_text(f"from {module} import {name}_2\nfrom elsewhere import {name}\n")
    monkeypatch.setattr(seams, "path", lambda _: tmp_path / "__init__.py")
    found = seams.check()
    assert list(found.values()) == [[f"{tmp_path}/one.py: imports it by name, past ours"]]


def test_an_excepthook_of_flowers_is_told(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("import threading\nthreading.excepthook = print\n")
    monkeypatch.setattr(seams, "path", lambda _: tmp_path / "__init__.py")
    assert seams.check() == {"DEAD_THREAD": [f"{tmp_path}/one.py: sets one of its own"]}


# --- questions about code -----------------------------------------------------------------------------------------

CODE = ast.parse(
    "import time\ndef f(x):\n    time.sleep(3)\n    if x:\n        time.sleep(0.5)\n    pull(x)\n    other.pull(1)\n"
)


@pytest.mark.parametrize(
    ("problem", "question", "right"),
    [
        ("", says, ["pull(", "time.sleep(3)"]),
        ("no 'push(' and no 'ull('", says, ["pull(", "push(", "ull("]),
        ("no 'time.sle'", says, ["time.sle"]),
        ("", in_order, ["sleep(3)", "sleep(0.5)", "pull(x)"]),
        ("not in this order: pull(x), sleep(3)", in_order, ["pull(x)", "sleep(3)"]),
        ("not in this order: pull(x), push", in_order, ["pull(x)", "push"]),
        ("", uses_only, ["time", "sleep"]),
        ("takes sleep of time", uses_only, ["time", "sleep", "monotonic"]),
        ("takes nothing of os", uses_only, ["os", "sleep"]),
        ("", called_with, ["time.sleep", "3", "0.5"]),
        ("calls time.sleep with 0.5, 3", called_with, ["time.sleep", "3"]),
    ],
)
def test_a_question_about_code_has_these_answers(problem, question, right):
    assert question(CODE, *right) == problem


def test_a_docstring_is_not_taken_for_code(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text('"""pull()"""\ndef f():\n    """pull()"""\n')
    monkeypatch.setattr(contracts, "path", lambda _: tmp_path / "one.py")
    contracts.tree.cache_clear()
    assert (
        contracts.says(contracts.at("one"), "pull(") == contracts.says(contracts.at("one:f"), "pull(") == "no 'pull('"
    )
    contracts.tree.cache_clear()


# --- a program that does not fit does not start ----------------------------------------------------------------

PROGRAMS = {
    "superlink.py": (
        "flwr.superlink.servicer.fleet.fleet_handlers",
        "push_messages",
        "flwr.superlink.cli",
        "flower_superlink",
    ),
    "supernode.py": ("flwr.supernode.start_client_internal", "time", "flwr.supernode.cli", "flower_supernode"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_does_not_fit_says_so_and_does_not_start(program, tmp_path):
    module, name, cli, entry = PROGRAMS[program]
    code = f"""
import importlib, runpy, sys
setattr(importlib.import_module({cli!r}), {entry!r}, lambda: print("started"))
delattr(importlib.import_module({module!r}), {name!r})
sys.argv = [{program!r}]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_module("bouquet.flower.{program.removesuffix(".py")}", run_name="__main__")
"""
    env = {"PATH": "", "BOUQUET_SIGNATURES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT, env=env, cwd=tmp_path
    )
    assert done.returncode == 1 and "started" not in done.stdout
    assert done.stderr.startswith("FLWR-01  Bouquet does not fit this version of Flower.\n  found  flwr "), done.stderr
    assert f"{module}:{name} (" in done.stderr and "Traceback" not in done.stderr


def test_nothing_of_the_app_is_imported_by_what_fits():
    """A process that works on messages has the bundle's `app`."""
    beside = str(ROOT)
    code = (
        f"import sys; sys.path.insert(0, {beside!r}); from bouquet.flower import seams; seams.check(); print('app' in"
        " sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENT, cwd="/")
    assert done.stdout == "False\n", done.stderr


def of_flower(tree: ast.AST) -> set[str]:
    """Names that a file has of Flower's, by import."""
    taken = [one for one in ast.walk(tree) if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("flwr")]
    taken += [
        one
        for one in ast.walk(tree)
        if isinstance(one, ast.Import) and any(name.name.startswith("flwr") for name in one.names)
    ]
    return {(name.asname or name.name).split(".")[0] for one in taken for name in one.names}


def reaches(file: Path) -> list[str]:
    """What a file puts into something of Flower's."""
    tree = ast.parse(file.read_text())
    flowers = of_flower(tree) | {"threading"}
    made = [one for one in ast.walk(tree) if isinstance(one, (ast.Assign, ast.AugAssign, ast.AnnAssign))]
    targets = [target for one in made for target in (one.targets if isinstance(one, ast.Assign) else [one.target])]
    found = [ast.unparse(each) for target in targets for each in getattr(target, "elts", [target])]
    return [name for name in found if "." in name and name.split(".")[0] in flowers]


def test_nothing_but_take_puts_something_into_flower():
    files = [*(ROOT / "bouquet").rglob("*.py"), *(ROOT / "app").rglob("*.py")]
    found = {file.name: names for file in files if (names := reaches(file))}
    assert found == {"wire.py": ["Array.inflate"], "bounds.py": ["http_grid.pull_objects"]}


def test_a_dead_threads_hook_is_ours_for_a_thread_that_is_made_afterwards(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    told = []
    seams.take(seams.DEAD_THREAD, lambda _: lambda failure: told.append(failure.exc_type))
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert told == [ZeroDivisionError]
