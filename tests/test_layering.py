"""Imports run one way. Read with `ast`, so lazy and TYPE_CHECKING imports count too.

config -> pricing -> tiers -> ops -> model -> checkpoint -> engine -> server, evaluate -> ablate ->
cli; tasks need nothing but config. Only `dvpa.ops` imports the kernels, only the cli reaches into
training, and the kernels import nothing of ours.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = {
    "dvpa": REPOSITORY / "dvpa",
    "dvpa_train": REPOSITORY / "train" / "dvpa_train",
    "dvpa_kernels": REPOSITORY / "kernels" / "dvpa_kernels",
}
# A unit may import units of a strictly lower rank, and itself.
RANKS = {
    "dvpa.validation": -1,
    "dvpa.architecture": 0,
    "dvpa.command_line": 0,
    "dvpa.fp8": 0,
    "dvpa.config": 0.5,
    "dvpa.pricing": 1,
    "dvpa.tasks": 1,
    "dvpa.plan": 1.5,
    "dvpa.tiers": 2,
    "dvpa.ops": 3,
    "dvpa.model": 4,
    "dvpa.experts_interface": 4,
    "dvpa.checkpoint": 5,
    "dvpa.registration": 5,
    "dvpa.engine": 6,
    "dvpa.server": 7,
    "dvpa.evaluate": 7,
    "dvpa.ablate": 7.5,
    "dvpa.cli": 8,
    "dvpa.__main__": 9,
}
# Training never meets serving: two programs over one model.
CLOSED_TO_TRAINING = {"dvpa.engine", "dvpa.server", "dvpa.cli", "dvpa.__main__"}
TORCH = {"torch", "lightning", "transformers", "safetensors"}
HTTP = {"fastapi", "pydantic", "starlette", "uvicorn", "sse_starlette", "prometheus_client"}
TORCH_FREE = ("dvpa.pricing", "dvpa.plan", "dvpa.tiers")


def module_name(path: Path, root: str) -> str:
    """Dotted name of a file below one of ROOTS."""
    parts = [root, *path.relative_to(ROOTS[root]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names that `source` imports anywhere; `from a import b` gives `a.b`.

    Constant arguments of `import_module` and `__import__` count as imports.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            first = node.args[0]
            if (
                called in {"import_module", "__import__"}
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                yield first.value


def top_level_names(source: str, module: str) -> Iterator[str]:
    """What importing the file executes: its imports outside functions and TYPE_CHECKING blocks."""
    tree = ast.parse(source)

    class Pruned(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    pruned = Pruned().visit(tree)
    yield from imported_names(ast.unparse(pruned), module)


def unit_of(name: str) -> str | None:
    """The unit of RANKS that a dotted name belongs to; None for the package's own top level.

    A public name such as `dvpa.TierMap` belongs to the unit defining it; `dvpa.cli_*` to the cli.
    """
    parts = name.split(".")
    if parts[0] != "dvpa":
        return None
    if len(parts) > 1 and parts[1].startswith("cli_"):
        return "dvpa.cli"
    if len(parts) > 1 and f"dvpa.{parts[1]}" in RANKS:
        return f"dvpa.{parts[1]}"
    exports = lazy_exports()
    if len(parts) > 1 and parts[1] in exports:
        return unit_of(exports[parts[1]])
    if len(parts) == 1 or parts[1].startswith("__"):
        return None
    return f"dvpa.{parts[1]}"


def lazy_exports() -> dict[str, str]:
    """The `_EXPORTS` table of dvpa/__init__.py: public name -> module."""
    for node in ast.parse((ROOTS["dvpa"] / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("dvpa/__init__.py has no _EXPORTS table")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of `module` that go the wrong way, each as a sentence."""
    found = []
    root, unit = module.split(".")[0], unit_of(module)
    for name in imported_names(source, module, is_package):
        target_root, target = name.split(".")[0], unit_of(name)
        if target_root not in ROOTS:
            continue
        if target_root == "dvpa_kernels" and root != "dvpa_kernels" and module != "dvpa.ops":
            found.append(f"{module} imports {name}: only dvpa.ops imports the kernels")
        elif root == "dvpa_kernels" and target_root != root:
            found.append(f"{module} imports {name}: the kernels import nothing of ours")
        elif root == "dvpa" and target_root == "dvpa_train" and unit != "dvpa.cli":
            found.append(f"{module} imports {name}: only the cli reaches into training")
        elif root == "dvpa_train" and target in CLOSED_TO_TRAINING:
            found.append(f"{module} imports {name}: training and serving never meet")
        elif root == "dvpa" and target is not None and target != unit:
            if target not in RANKS:
                found.append(f"{module} imports {name}, which has no rank")
            elif unit == "dvpa.tasks" and target != "dvpa.config":
                found.append(f"{module} imports {name}: tasks need nothing but config")
            elif unit is not None and RANKS[target] >= RANKS[unit]:
                found.append(f"{module} imports {name}: upward")
    return found


def sources() -> list[tuple[str, Path]]:
    return [
        (module_name(path, root), path)
        for root, folder in ROOTS.items()
        for path in sorted(folder.rglob("*.py"))
    ]


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda value: str(value)[-60:])
def test_imports_run_one_way(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


def test_every_file_has_a_rank() -> None:
    units = {unit_of(module) for module, _ in sources() if module.startswith("dvpa.")} - {None}
    assert units <= set(RANKS)
    assert len(units) >= 5


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dvpa.tiers.policy", "from dvpa.model import DvpaForCausalLM"),
        ("dvpa.tiers.policy", "from dvpa import DvpaForCausalLM"),
        ("dvpa.tiers.policy", "from ..model.router import Router"),
        ("dvpa.tiers.policy", "def late():\n    import dvpa.engine.engine"),
        ("dvpa.model.router", "if TYPE_CHECKING:\n    from dvpa.checkpoint import export"),
        ("dvpa.model.router", "import importlib\nimportlib.import_module('dvpa.cli')"),
        ("dvpa.config", "from dvpa.pricing import price"),
        ("dvpa.server.app", "import dvpa.evaluate.report"),
        ("dvpa.evaluate.report", "import dvpa.server.app"),
        ("dvpa.tasks.task_set", "from dvpa.tiers import TierMap"),
        ("dvpa.tasks.task_set", "from dvpa.pricing import price"),
        ("dvpa.model.experts", "from dvpa_kernels import moe_mlp"),
        ("dvpa_train.module", "import dvpa_kernels"),
        ("dvpa.evaluate.report", "from dvpa_train.main import run"),
        ("dvpa_train.module", "from dvpa.engine import Engine"),
        ("dvpa_kernels.ops", "from dvpa.config import DvpaConfig"),
        ("dvpa_kernels.ops", "import dvpa"),
        ("dvpa.model.router", "from dvpa.nowhere import thing"),
    ],
)
def test_a_wrong_edge_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dvpa.model.router", "from dvpa.config import DvpaConfig\nfrom . import experts"),
        ("dvpa.model.router", "from dvpa import DvpaConfig, __version__"),
        ("dvpa.ops", "from dvpa_kernels import moe_mlp"),
        ("dvpa.cli", "def train():\n    from dvpa_train.main import run"),
        ("dvpa.tasks.tokenizer", "from dvpa.config import DvpaConfig\nimport dvpa.tasks.text"),
        ("dvpa_train.module", "from dvpa.model import DvpaForCausalLM"),
        ("dvpa.model.router", "import torch"),
    ],
)
def test_a_right_edge_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_torch_free_files_name_no_torch() -> None:
    for module, path in sources():
        names = {name.split(".")[0] for name in imported_names(path.read_text(), module)}
        if module.startswith(TORCH_FREE):
            assert not names & TORCH, module


def test_only_the_server_knows_http() -> None:
    for module, path in sources():
        names = {name.split(".")[0] for name in imported_names(path.read_text(), module)}
        if not module.startswith("dvpa.server"):
            assert not names & HTTP, module


def test_config_and_tasks_import_no_torch_at_their_top_level() -> None:
    for module, path in sources():
        names = {name.split(".")[0] for name in top_level_names(path.read_text(), module)}
        if module == "dvpa.config" or module.startswith("dvpa.tasks"):
            assert not names & {"torch", "lightning"}, module


def test_tiers_pricing_and_tasks_load_without_torch() -> None:
    program = "import sys, dvpa, dvpa.pricing, dvpa.plan, dvpa.tiers, dvpa.tasks, dvpa.cli\n"
    program += "import dvpa.tiers.tier_map, dvpa.tiers.policy, dvpa.tasks.task_set\n"
    program += "loaded = {'torch', 'transformers', 'lightning'} & set(sys.modules)\n"
    program += "raise SystemExit(f'loaded: {sorted(loaded)}' if loaded else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
