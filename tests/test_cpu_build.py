"""How the CPU kernels are built and cached: once, announced, and never in the way."""

import logging
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dvpa_kernels import make_routing
from dvpa_kernels.cpu import build, library, moe_mlp_cpu, status
from dvpa_kernels.cpu.build import COMPILE_FLAGS, MAIN_SOURCE, find_compiler, loaded_openmp
from dvpa_kernels.torch_grouped import moe_mlp_torch

REPOSITORY = Path(__file__).resolve().parent.parent

needs_kernel = pytest.mark.skipif(status().isa is None, reason=f"no kernel: {status().reason}")


def in_process(
    program: str, cache: Path, set_up_logs: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process with its own kernel cache; log lines go to stderr."""
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "train", "kernels"))
    variables = {**os.environ, "PYTHONPATH": path, "DVPA_CACHE": str(cache), **environment}
    if set_up_logs:
        program = "import logging; logging.basicConfig(level='INFO')\n" + program
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


TINY_CALL = """
import torch
from dvpa_kernels import make_routing, moe_mlp
from dvpa_kernels.cpu import status
torch.manual_seed(0)
routing = make_routing(torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2), 3)
inputs = torch.randn(2, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8), routing
with torch.no_grad():
    for _ in range(2):
        ours = moe_mlp(*inputs, backend="cpu")
torch.testing.assert_close(ours, moe_mlp(*inputs, backend="reference"), rtol=1e-4, atol=1e-4)
print(status().isa)
"""


@needs_kernel
def test_the_library_brings_no_second_openmp() -> None:
    if not status().shares_openmp:
        pytest.skip("PyTorch has loaded no OpenMP runtime")
    lines = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {os.path.realpath(line.split()[-1]) for line in lines if re.search("lib.omp", line)}
    assert os.path.realpath(str(loaded_openmp())) in runtimes
    needed = subprocess.run(
        ["readelf", "-d", str(status().library)], capture_output=True, text=True, check=False
    )
    assert not re.search("NEEDED.*(omp|stdc)", needed.stdout)


@needs_kernel
def test_the_bf16_dot_product_is_in_the_library() -> None:
    if os.uname().machine != "x86_64" or shutil.which("objdump") is None:
        pytest.skip("needs objdump on x86_64")
    command = ["objdump", "-d", "--no-show-raw-insn", str(status().library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.count("vdpbf16ps") > 50


def test_without_a_compiler_pytorch_does_it_and_says_so(tmp_path: Path) -> None:
    done = in_process(TINY_CALL, tmp_path, PATH="/nowhere", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "no C++ compiler found" in warnings[0]
    assert "F.grouped_mm and F.linear" in warnings[0]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-c++", "CXX=no-such-c++: no such compiler"), ("false", "failed with status 1")],
)
def test_a_failing_build_names_its_reason(
    compiler: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("DVPA_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", None)
    routing = make_routing(torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2), 3)
    inputs = torch.randn(3, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8), routing
    with caplog.at_level(logging.WARNING):
        out = [moe_mlp_cpu(*inputs) for _ in range(3)]
    assert torch.equal(out[0], moe_mlp_torch(*inputs))
    failures = [text for text in caplog.messages if "no CPU kernels" in text]
    assert len(failures) == 1
    assert reason in failures[0]
    assert library.status().isa is None
    assert reason in str(library.status().reason)
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real compiler without its optimiser, for tests of the build itself."""
    if status().isa is None:
        pytest.skip("no compiler")
    wrapper = tmp_path_factory.mktemp("compiler") / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {find_compiler()[0]} "$@" -O0\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def test_one_build_serves_every_process(
    tmp_path: Path, quick_compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two race for it and both get it; a process after them finds it; a broken file is mended."""
    monkeypatch.setenv("CXX", quick_compiler)
    monkeypatch.setenv("DVPA_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(build.build, False) for _ in range(2)]
    assert paths[0].result() == paths[1].result()
    (built,) = tmp_path.iterdir()  # the one library, and nothing left of either build
    before = built.stat().st_mtime_ns
    later = in_process(TINY_CALL, tmp_path)
    assert later.returncode == 0, later.stderr
    assert later.stdout == f"{status().isa}\n"
    assert "building" not in later.stderr
    assert built.stat().st_mtime_ns == before
    built.write_bytes(b"not a library")
    monkeypatch.setattr(library, "_loaded", None)
    assert library.status().isas
    assert built.stat().st_size > 10_000


def test_the_build_is_announced_where_nobody_set_up_logs(
    tmp_path: Path, quick_compiler: str
) -> None:
    done = in_process(TINY_CALL, tmp_path, set_up_logs=False, CXX=quick_compiler)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["building the CPU kernels with c++ (under a minute, once)"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, quick_compiler: str) -> None:
    """The library then lives in a private folder that is gone once it is loaded."""
    blocked, scratch = tmp_path / "file", tmp_path / "scratch"
    blocked.write_text("")
    scratch.mkdir()
    done = in_process(TINY_CALL, blocked / "cache", CXX=quick_compiler, TMPDIR=str(scratch))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{status().isa}\n"
    assert "cannot be written" in done.stderr
    assert not list(scratch.iterdir())


def test_the_flags_ask_for_no_inexact_mathematics() -> None:
    assert not {"-ffast-math", "-Ofast", "-march=native"} & set(COMPILE_FLAGS)
    assert MAIN_SOURCE.is_file()
