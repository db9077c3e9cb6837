"""Flattens the model's modules into two files that need nothing of ours (see `standalone.py`).

The files are made from the source of the installed package, so that there is no second copy to
keep: follow the imports down from `dvpa.model.causal_lm`, put every module after the ones it needs,
drop the imports between our modules, hoist all others. Definitions are not touched, except that a
private name which two modules define is renamed in one of them, and that of `if IS_PACKAGE:` only
the other branch stays: compiled kernels remain with the package. What flattening would break is
refused: two modules that define one public name, or an import of ours under another name.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

from dvpa.model.standalone import CONFIGURATION_FILE, MODELING_FILE

ROOTS = ("dvpa", "dvpa_kernels")
PACKAGE_FLAG = "IS_PACKAGE"
HEADER = "# Written by dvpa from its own source, for use without it. License: Apache-2.0."


@dataclass
class _Flat:
    """Several modules as one text: foreign imports, definitions, and where each name comes from."""

    imports: dict[str, None] = field(default_factory=dict)  # lines, in order, each once
    bodies: list[str] = field(default_factory=list)
    origin: dict[str, tuple[str, str]] = field(
        default_factory=dict
    )  # name -> module, its statement

    def text(self, own_imports: str = "") -> str:
        """The file's source."""
        parts = [HEADER, "\n".join(sorted(self.imports)), own_imports, *self.bodies]
        return "\n\n".join(part for part in parts if part) + "\n"


@cache
def bundle() -> dict[str, str]:
    """File name -> source of the two files.

    Raises:
        ValueError: our source cannot be flattened; the message says where and why.
    """
    configuration, modeling = _Flat(), _Flat()
    of_configuration = _with_needs("dvpa.config", [])
    for module in of_configuration:
        _flatten(module, configuration)
    of_modeling = _with_needs("dvpa.model.causal_lm", [])
    shared: set[str] = set()
    for module in of_modeling:
        if module not in of_configuration:
            _flatten(module, modeling)
            shared.update(
                alias.name
                for node in ast.walk(ast.parse(_source(module)))
                if isinstance(node, ast.ImportFrom) and node.module in of_configuration
                for alias in node.names
            )
    stem = CONFIGURATION_FILE.removesuffix(".py")
    return {
        CONFIGURATION_FILE: configuration.text(),
        MODELING_FILE: modeling.text(f"from .{stem} import {', '.join(sorted(shared))}"),
    }


def _source(module: str) -> str:
    spec = find_spec(module)
    loader = None if spec is None else spec.loader
    source = loader.get_source(module) if hasattr(loader, "get_source") else None  # type: ignore[union-attr]
    if source is None:
        raise ValueError(f"{module}: its source is not available")
    return str(source)


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in ROOTS


def _own_imports(module: str) -> Iterator[ast.ImportFrom]:
    """Imports of our modules that running `module` executes."""
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module)):
            if node.level or any(alias.asname or alias.name == "*" for alias in node.names):
                raise ValueError(f"{module}:{node.lineno}: import ours by full, unchanged name")
            yield node
        elif isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise ValueError(f"{module}:{node.lineno}: write `from ... import ...`")


def _with_needs(module: str, done: list[str]) -> list[str]:
    """`done`, extended by `module` after every module of ours that it needs."""
    for node in _own_imports(module):
        assert node.module is not None
        if node.module not in done:
            _with_needs(node.module, done)
    if module not in done:
        done.append(module)
    return done


def _flatten(module: str, flat: _Flat) -> None:
    """Add one module to a file."""
    source = _source(module)
    tree = ast.parse(source)
    notes = (ast.get_docstring(tree) or "").splitlines()
    if any(_asks_for_package(node) for node in ast.walk(tree)):
        source = ast.unparse(_Alone().visit(tree))
        tree = ast.parse(source)
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    for name in names:
        if name.id == PACKAGE_FLAG and isinstance(name.ctx, ast.Load):
            raise ValueError(f"{module}:{name.lineno}: ask `if {PACKAGE_FLAG}:` and no more")
    clashes = _clashes(module, tree, flat)
    if clashes:  # rare, so losing the comments of that module is no loss
        source = ast.unparse(_Renamed(module, clashes).visit(tree))
        tree = ast.parse(source)
    lines = source.splitlines()
    for node in tree.body:
        dropped = _is_docstring(node) or _is_own_typing(node)
        dropped = dropped or _bound(node) in (["__all__"], [PACKAGE_FLAG])
        if isinstance(node, ast.Import | ast.ImportFrom):
            dropped = True
            for single in _split(node):
                flat.imports[ast.unparse(single)] = None
                _claim(module, single, flat)
        elif not dropped:
            _claim(module, node, flat)
        if dropped:
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    body = "\n".join(lines).strip()
    if body:
        title = [f"# {module}", "#", *(f"# {note}".rstrip() for note in notes)]
        flat.bodies.append("\n" + "\n".join(title) + "\n\n" + body)


def _asks_for_package(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == PACKAGE_FLAG
    )


class _Alone(ast.NodeTransformer):
    """Takes the other branch of `if IS_PACKAGE:`."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return list(node.orelse) if _asks_for_package(node) else node


class _Renamed(ast.NodeTransformer):
    """Gives private top-level names of a module new ones, wherever they are used."""

    def __init__(self, module: str, names: set[str]) -> None:
        self._new = {name: f"{name}_of_{module.rpartition('.')[2]}" for name in names}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self._new.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.arg in self._new:
            raise ValueError(f"{node.arg}: both an argument and a private name of two modules")
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if node.col_offset == 0:  # methods are reached through their class
            node.name = self._new.get(node.name, node.name)
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.name = self._new.get(node.name, node.name)
        self.generic_visit(node)
        return node


def _clashes(module: str, tree: ast.Module, flat: _Flat) -> set[str]:
    """Private names that this module and an earlier one define differently."""
    return {
        name
        for node in tree.body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        for name in _bound(node)
        if name.startswith("_")
        and name != "__all__"
        and flat.origin.get(name, (module, ""))[1] != ast.unparse(node)
        and name in flat.origin
    }


def _claim(module: str, node: ast.stmt, flat: _Flat) -> None:
    """Note what a statement binds; two modules may bind a name by the same statement (`logger`)."""
    statement = ast.unparse(node)
    for name in _bound(node):
        there, before = flat.origin.setdefault(name, (module, statement))
        if there != module and before != statement:
            raise ValueError(f"{name}: bound differently in {there} and in {module}")


def _split(node: ast.Import | ast.ImportFrom) -> list[ast.stmt]:
    """An import of foreign names as one statement per name; nothing for an import of ours."""
    if isinstance(node, ast.Import):
        return [ast.Import([alias]) for alias in node.names]
    if _is_ours(node.module):
        return []
    return [ast.ImportFrom(node.module, [alias], node.level) for alias in node.names]


def _bound(node: ast.stmt) -> list[str]:
    """Names that a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_own_typing(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` around imports of ours: one file needs none of them."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
