"""A seam with Flower: its contract, held against Flower's source, and the one function that puts ours in its place.

The source is read and not imported, so that a contract can be held before anything runs: where a name is bound, what a
function takes, who looks it up, what its code has. take() holds it, puts ours in, and looks whether it took: a patch
that no longer takes would else be silent.
Enters: seams (seams.py has them all); for take() also Flower, imported, and what makes ours out of Flower's own.
Leaves: what does not hold; ours in its place. Errors: FLWR-01 for a seam that does not fit.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType
from typing import Any

FITS = "1.41.0"  # the version of flwr that is locked


class Gone(Exception):
    """What is looked for is not there."""


# --- questions about code --------------------------------------------------------------------------------------------


def says(node: ast.AST, *wanted: str) -> str:
    """Each of these is in the code, layout aside; what is missing."""
    code = ast.unparse(node)
    whole = [rf"(?<![\w.]){re.escape(one)}" + (r"(?!\w)" if one[-1].isalnum() else "") for one in wanted]
    return " and ".join(f"no {one!r}" for one, there in zip(wanted, whole, strict=True) if not re.search(there, code))


def in_order(node: ast.AST, *wanted: str) -> str:
    code = ast.unparse(node)
    at = [code.find(one) for one in wanted]
    return "" if -1 not in at and at == sorted(at) else f"not in this order: {', '.join(wanted)}"


def uses_only(node: ast.AST, name: str, *attributes: str) -> str:
    """Of what goes by that name it takes these attributes and no others."""
    of_it = [one for one in ast.walk(node) if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name)]
    used = {one.attr for one in of_it if isinstance(one.value, ast.Name) and one.value.id == name}
    return "" if used == set(attributes) else f"takes {', '.join(sorted(used)) or 'nothing'} of {name}"


def called_with(node: ast.AST, name: str, *first: str) -> str:
    """The first arguments of all calls of that name, whatever their order, are these."""
    calls = [one for one in ast.walk(node) if isinstance(one, ast.Call) and ast.unparse(one.func) == name]
    there = {ast.unparse(call.args[0]) for call in calls if call.args}
    return "" if there == set(first) else f"calls {name} with {', '.join(sorted(there)) or 'nothing'}"


# --- places ----------------------------------------------------------------------------------------------------------


def path(module: str) -> Path:
    """Where a module's source is; of Flower without importing any of it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if not spec or not spec.origin:
        raise Gone(f"no {top}")
    if not rest:
        return Path(spec.origin)
    file = Path(spec.origin).parent.joinpath(*rest)
    for one in (file.with_suffix(".py"), file / "__init__.py"):
        if one.is_file():
            return one
    raise Gone(f"no module {module}")


@cache
def tree(module: str) -> ast.Module:
    """A module's code, without what it says of itself."""
    parsed = ast.parse(path(module).read_text())
    for node in ast.walk(parsed):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node, False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return parsed


def bound(node: ast.AST, name: str) -> ast.AST:
    """What binds a name in a module or a class: a definition, an assignment or an import; not inside of functions."""
    for one in statements(node):
        if isinstance(one, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [one.name]
        elif isinstance(one, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name for alias in one.names]
        elif isinstance(one, ast.AnnAssign):
            names = [ast.unparse(one.target)] if one.value else []
        else:
            names = [ast.unparse(target) for target in one.targets] if isinstance(one, ast.Assign) else []
        if name in names:
            return one
    raise Gone(f"no {name}")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for field in ("body", "handlers", "orelse", "finalbody"):
        for one in getattr(node, field, ()):
            yield one
            if isinstance(one, (ast.Try, ast.If, ast.ExceptHandler)):
                yield from statements(one)


def at(place: str) -> ast.AST:
    """The code at a place; a whole module where it names none of its parts."""
    module, _, names = place.partition(":")
    node: ast.AST = tree(module)
    for name in filter(None, names.split(".")):
        node = bound(node, name)
    return node


def parameters(function: ast.AST) -> str:
    arguments = getattr(function, "args", None)
    if not isinstance(arguments, ast.arguments):
        raise Gone("no function")
    return ", ".join(one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))


# --- a seam ----------------------------------------------------------------------------------------------------------


Fact = tuple[Callable[..., str], str, tuple[str, ...]]  # a question, a place ('' is the seam's own), what is right


def fact(question: Callable[..., str], place: str, *right: str) -> Fact:
    return question, place, right


@dataclass(frozen=True)
class Seam:
    """place: "module:name" or "module:Class.name". takes: its parameters, where it is called. home: where it is
    written, if `place` has it by import or inheritance. seen: (function, how it names it), looked up at every call."""

    place: str
    why: str
    instead: str  # what Flower has, or would have to have, for this to go
    takes: str | None = None
    home: str = ""
    seen: tuple[tuple[str, str], ...] = ()
    facts: tuple[Fact, ...] = ()
    ours: bool = True


def wrong(seam: Seam) -> list[str]:
    """What does not hold of a seam's contract, by the source."""
    home, found = seam.home or seam.place, list[str]()
    inherited = seam.home and "." in seam.place.partition(":")[2]
    asked: list[tuple[str, Callable[[Any], str]]] = [
        (place, lambda node: "") for place in (home, home if inherited else seam.place)
    ]
    if seam.takes is not None:
        asked.append((home, lambda node: "" if (its := parameters(node)) == seam.takes else f"takes {its}"))
    asked += [(place, partial(_ask, says, (spelled,))) for place, spelled in seam.seen]
    asked += [(place or home, partial(_ask, question, right)) for question, place, right in seam.facts]
    for place, look in asked:
        try:
            problem = look(at(place))
        except (Gone, OSError, SyntaxError) as error:
            problem = str(error)
        if problem:
            found.append(f"{place}: {problem}")
    return list(dict.fromkeys(found))


def _ask(question: Callable[..., str], right: tuple[str, ...], node: Any) -> str:
    return question(node, *right)


# --- put into the running Flower -------------------------------------------------------------------------------------


def hold(*needed: Seam) -> None:
    """Look before anything begins whether these will take, by the source. Errors: FLWR-01."""
    for seam in needed:
        if problems := wrong(seam):
            raise misfit(seam, problems[0])


def take(seam: Seam, make: Callable[[Any], Any]) -> Any:
    """Put make(Flower's own) in a seam's place, seen by whoever uses it; ours. Errors: FLWR-01 when it did not take."""
    assert seam.ours, seam.place
    hold(seam)
    try:
        owner, name = _owner(seam.place)
        own = getattr(owner, name)
        if seam.takes is not None and (its := ", ".join(inspect.signature(own).parameters)) != seam.takes:
            raise Gone(f"takes {its}")
        if inspect.isclass(owner) and name not in vars(owner):
            if not seam.home:
                raise Gone(f"has no {name} of its own")
            base, known = _owner(seam.home)
            if own is not vars(base).get(known):
                raise Gone(f"is not {seam.home}")
        if past := [] if seam.home else list(_others(owner, own)):
            raise Gone(f"{past[0]} has it by name, past ours")
        new = make(own)
        setattr(owner, name, new)
        if getattr(owner, name) is not new:
            raise Gone("does not keep ours")
        for place, spelled in seam.seen:
            if not _sees(place, spelled, new):
                raise Gone(f"{place} does not see ours")
    except (Gone, ImportError, AttributeError, TypeError, ValueError) as error:
        raise misfit(seam, str(error)) from error
    return new


def _owner(place: str) -> tuple[Any, str]:
    """The module or the class that has it, and its name there."""
    module, _, names = place.partition(":")
    owner = importlib.import_module(module)
    *classes, name = names.split(".")
    for one in classes:
        owner = getattr(owner, one)
    return owner, name


def _others(owner: Any, own: Any) -> Iterator[str]:
    """Modules of Flower that hold the same function under a name of their own."""
    for name, module in list(sys.modules.items()):
        theirs = callable(own) and inspect.ismodule(owner) and name.startswith("flwr.") and module is not owner
        if theirs and any(value is own for value in list(vars(module).values())):
            yield name


def _sees(place: str, spelled: str, new: Any) -> bool:
    """Whether the function that is at a place now finds ours by that name; of a local name the source alone tells."""
    owner, called = _owner(place)
    function = inspect.unwrap(getattr(owner, called))
    first, *rest = spelled.split(".")
    if not {*rest, *([] if rest else [first])} <= _named(function.__code__):
        return False
    if first == "self":
        value = owner
    elif first in function.__globals__:
        value = function.__globals__[first]
    else:
        code = function.__code__
        return first in code.co_varnames + code.co_cellvars  # the second: what a function in it takes
    while value is not new and rest:
        value = getattr(value, rest.pop(0), None)
    return value is new


def _named(code: CodeType) -> set[str]:
    """What code takes from its module or of anything, the functions in it included."""
    return {*code.co_names}.union(*(_named(one) for one in code.co_consts if isinstance(one, CodeType)))


def begin(*steps: Callable[[], object]) -> None:
    """Take what a program needs, one step after another; where Flower does not fit, say so and end here."""
    try:
        for step in steps:
            step()
    except Exception as error:
        if not isinstance(error, _bouquet_error()):
            raise
        sys.exit(error.report())
    finally:
        tree.cache_clear()  # some megabytes


def misfit(seam: Seam, found: str) -> Exception:
    try:
        there = version("flwr")
    except PackageNotFoundError:
        there = "none"
    found = f"flwr {there}, {seam.place} ({seam.why}): {found}"
    fix = f"install flwr {FITS}: docker/install, or take the hub's image"
    error: Exception = _bouquet_error()("FLWR-01", found=found, fix=fix)
    return error


def _bouquet_error() -> Any:
    """Imported when it is needed: a process that works on messages must find the bundle's `app`, not this one."""
    return importlib.import_module("app.errors").BouquetError
