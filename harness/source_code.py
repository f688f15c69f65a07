"""Hash the source code that computes a result, so that results become invalid when it changes.

The code of a module is its syntax tree without docstrings and comments, together with that of all
project modules that it imports, directly or indirectly. No version number has to be increased by
hand, and a changed comment has no effect.

Packages that only collect modules, such as all routers or all task sources, are not followed. A
name imported from such a package leads to the module that defines it, so a change of one router
leaves the answers of all other routers valid. The code of a router comes from its class, see
`router_code`.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import phatgoose
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router, Wrapper

# Modules that compute the answers of evaluation actors, experts, profiles and metrics.
SCORING = ("harness.evaluation.answering", "harness.scheduling.load_base")
TRAINING = ("harness.training.job", "harness.training.engine", "harness.scheduling.load_base")
PROFILES = ("harness.training.profile", "harness.scheduling.load_base")
METRICS = ("harness.evaluation.task_scores",)

# Packages that collect modules (all routers, all task sources), and this module.
_COLLECTIONS = ("phatgoose", "phatgoose.routers", "harness.tasks", "harness.tasks.sources")
_NOT_FOLLOWED = (*_COLLECTIONS, __name__)
_INSTALLED = {Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")}
_ROOTS = {"phatgoose": Path(phatgoose.__file__).parent, "harness": Path(__file__).parent}

# From a module's name to the hash of its own code.
Code = dict[str, str]


def code_of(modules: Iterable[str]) -> Code:
    """Return the hash of each module, including all project modules that they import.

    Raises:
        PhatgooseError: a module has no source file.
    """
    found: Code = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = _hash(module)
            waiting += [name for name in _imports(module) if _is_ours(name, modules)]
    return dict(sorted(found.items()))


def router_code(router: Router) -> Code:
    """Return the code of a router: the modules of its classes and of its inner router."""
    classes = [one for one in type(router).__mro__ if issubclass(one, Router)]
    found = code_of(dict.fromkeys(one.__module__ for one in classes))
    return found | router_code(router.inner) if isinstance(router, Wrapper) else found


def digest(code: Mapping[str, str]) -> str:
    """Return a single hash, 16 hexadecimal digits, for the code of many modules."""
    text = "\n".join(f"{module} {code[module]}" for module in sorted(code))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names of modules that differ; new and removed ones end in `(new)` or `(gone)`."""
    names = []
    for module in sorted({*before, *now}):
        if module not in before:
            names.append(f"{module} (new)")
        elif module not in now:
            names.append(f"{module} (gone)")
        elif before[module] != now[module]:
            names.append(module)
    return names


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    if file is None:
        raise PhatgooseError(
            f"module {module} has no source file, and its code is part of the identity of "
            "results. Put it into a .py file."
        )
    return ast.parse(file.read_bytes())


@cache
def _hash(module: str) -> str:
    tree = ast.parse(ast.unparse(_tree(module)))  # a copy
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    # Hash the source text, since dumps of trees differ between versions of Python.
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _file(module: str) -> Path | None:
    """Return the source file of a module. Project modules are found without an import."""
    package, _, rest = module.partition(".")
    if package in _ROOTS:
        path = _ROOTS[package].joinpath(*rest.split(".")) if rest else _ROOTS[package]
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
        return None
    name = getattr(sys.modules.get(module), "__file__", None)
    return Path(name) if name and name.endswith(".py") else None


def _is_ours(module: str, roots: Iterable[str]) -> bool:
    """Return whether to follow an import: within this project, or within a plugin's own package."""
    package = module.partition(".")[0]
    if module in _NOT_FOLLOWED or (file := _file(module)) is None:
        return False
    if package in {*_ROOTS, *(root.partition(".")[0] for root in roots)}:
        return True
    # A plugin may consist of single files in one folder; installed libraries are not part of it.
    beside = {found.parent for root in roots if (found := _file(root)) and "." not in root}
    return file.parent in beside - _INSTALLED


@cache
def _imports(module: str) -> tuple[str, ...]:
    """Return the modules that a module imports, except those only for type hints."""
    return tuple(_found_imports(module))


def _found_imports(module: str) -> Iterator[str]:
    collections: dict[str, str] = {}  # imported collections, by local name
    for node in _walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            collections |= {a.asname or a.name: a.name for a in node.names if _collects(a.name)}
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module)
            yield source
            for alias in node.names:
                yield f"{source}.{alias.name}"  # it may be a module
                if source in _COLLECTIONS:
                    yield _defining_module(source, alias.name)
                if _collects(inner := f"{source}.{alias.name}"):
                    collections[alias.asname or alias.name] = inner
    for node in _walk(_tree(module)):
        if isinstance(node, ast.Attribute) and (name := ast.unparse(node.value)) in collections:
            yield _defining_module(collections[name], node.attr)


def _collects(module: str) -> bool:
    return module in _COLLECTIONS


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes of a tree except those under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _walk(other)
        else:
            yield from _walk(child)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """Return the absolute name of the module in `from X import ...`, where X may be relative."""
    if not node.level:
        return node.module or ""
    file = _file(module)
    parts = module.split(".") + (["__init__"] if file and file.name == "__init__.py" else [])
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def _defining_module(package: str, name: str) -> str:
    """Return the module that a package imports a name from, or the package if it defines it."""
    for node in _tree(package).body:
        if isinstance(node, ast.ImportFrom) and name in {a.asname or a.name for a in node.names}:
            return _absolute(node, package)
    return package
