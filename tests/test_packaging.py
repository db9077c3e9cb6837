"""One distribution, three import packages, and nothing that takes a name belonging to others."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = ("dvpa", "train", "kernels", "scripts", "tests")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def python_files() -> list[Path]:
    return [
        path for folder in SOURCE_FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))
    ]


def run_isolated(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that sees only what is installed: no PYTHONPATH, no current folder."""
    command = [sys.executable, "-I", "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository, once the installed package is known to be this checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    found = run_isolated("import dvpa; print(dvpa.__file__)", folder)
    if found.returncode:
        pytest.skip("dvpa is not installed into this Python; run `make install`")
    if REPOSITORY not in Path(found.stdout.strip()).parents:
        pytest.skip("another copy of dvpa is installed into this Python")
    return folder


@pytest.mark.parametrize("package", ["dvpa", "dvpa_train", "dvpa_kernels"])
def test_package_is_importable_from_elsewhere(package: str, elsewhere: Path) -> None:
    done = run_isolated(f"import {package}", elsewhere)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["train", "kernels", "tests", "configs", "scripts", "docs"])
def test_foreign_name_is_not_ours(name: str, elsewhere: Path) -> None:
    """`kernels` may be Hugging Face's; it must never be a folder of this repository."""
    program = (
        "import importlib.util\n"
        f"spec = importlib.util.find_spec({name!r})\n"
        "places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]\n"
        "print('\\n'.join(str(place) for place in places))"
    )
    done = run_isolated(program, elsewhere)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stdout.splitlines() if line.startswith(str(REPOSITORY))]


def test_the_command_and_the_configs_are_installed(elsewhere: Path) -> None:
    program = (
        "from importlib.metadata import entry_points\n"
        "assert entry_points(group='console_scripts', name='dvpa')\n"
        "from dvpa.config import find_config\n"
        "find_config('model/pico.yaml')"
    )
    done = run_isolated(program, elsewhere)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wheel_holds_three_packages_and_every_config(tmp_path: Path) -> None:
    """Built from a copy: setuptools leaves its build folder beside the sources."""
    shipped = ("dvpa", "train", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE")
    for name in shipped:
        source = REPOSITORY / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, tmp_path / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "-w", "wheels", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names if ".d" not in name.split("/")[0]}
    assert folders == {"dvpa", "dvpa_train", "dvpa_kernels"}
    data = {name.split("/data/share/dvpa/")[1] for name in names if "/data/share/dvpa/" in name}
    assert data == {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "configs").rglob("*")
        if path.is_file()
    }


def test_setuptools_finds_exactly_our_packages() -> None:
    from setuptools import find_packages

    options = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert options["namespaces"] is False
    found = {
        name
        for root in options["where"]
        for name in find_packages(str(REPOSITORY / root), include=options["include"])
    }
    assert {name.split(".")[0] for name in found} == {"dvpa", "dvpa_train", "dvpa_kernels"}


def test_every_source_folder_is_a_package() -> None:
    """With `namespaces = false` a folder without __init__.py would be left out of the wheel."""
    for root in ("dvpa", "train/dvpa_train", "kernels/dvpa_kernels"):
        for path in (REPOSITORY / root).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_every_config_folder_is_shipped() -> None:
    shipped = PROJECT["tool"]["setuptools"]["data-files"]
    folders = {path.parent for path in (REPOSITORY / "configs").rglob("*.yaml")}
    for folder in folders:
        relative = folder.relative_to(REPOSITORY)
        kinds = {path.suffix for path in folder.iterdir() if path.is_file()}
        expected = sorted(f"{relative}/*{kind}" for kind in kinds)
        assert sorted(shipped.get(f"share/dvpa/{relative}", [])) == expected


def test_forbidden_files_do_not_exist() -> None:
    for folder in ("train", "kernels", "configs", "scripts"):
        assert not (REPOSITORY / folder / "__init__.py").exists()
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))
    assert not [path for path in python_files() if path.name in {"utils.py", "common.py"}]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_file_is_short_and_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert text.isascii()


def test_init_files_only_export() -> None:
    for path in python_files():
        if path.name == "__init__.py" and path.parent != REPOSITORY / "dvpa":
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            assert len(lines) <= 20, path


def test_the_library_does_not_print() -> None:
    for path in python_files():
        root, name = path.relative_to(REPOSITORY).parts[0], path.name
        if root not in {"dvpa", "train", "kernels"} or name.startswith("cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_versions_agree() -> None:
    import dvpa

    assert dvpa.__version__ == PROJECT["project"]["version"]
    assert f"## {dvpa.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
