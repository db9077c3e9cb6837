"""`dvpa assemble` beside mergekit and the disk, on synthetic parents; memory by size of the model.

    python scripts/bench_assemble.py --mergekit VENV/bin/mergekit-yaml [--parents DIR] [--work DIR]
        [--rounds 3] [--parts merge cold fp8 rounding sizes]
        [--out docs/benchmarks/assemble.json]

merge: every round, one after the other: dd reads the parents and writes and syncs as much as the
result (that minute's disk bound), then dvpa or mergekit merges 0.6 A + 0.4 B. Each contender is a
process of its own; its wall and CPU time, and its anonymous memory, sampled every 10 ms, are those
of the whole command. Without --mergekit it is left out, and said so. cold: the same with the
parents put out of the page cache before each command and each dd, as large ones always are; there
the bound is the disk's. fp8: DeepSeek-V3's format
against the exact interpolation. rounding: what E4M3 itself costs there. sizes: the memory of
parents of 1 GB and of 8 GB (26 GB of disk), these once with more and once with larger tensors; no
timing, any machine will do. Parts that are not asked for keep their place in --out. Everything made
in --work is removed again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from assemble_exactness import beside_mergekit, exactness
from assemble_parents import make_parents

from dvpa.checkpoint.fp8 import dequantise, quantise, requantise
from dvpa.checkpoint.shards import ShardReader
from dvpa.evaluate.report import describe_environment

SHARES = (0.6, 0.4)
SAMPLE_S = 0.01
SCALE = "_scale_inv"
PARTS = ("merge", "cold", "fp8", "rounding", "sizes")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
MERGEKIT: dict[str, tuple[list[str], dict[str, str]]] = {
    "mergekit": ([], {}),
    "mergekit, one thread, shards of 100M": (["--out-shard-size", "100M"], ONE_THREAD),
    "mergekit, one thread, asynchronous": (["--async-write"], ONE_THREAD),
}
DISTANCES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of FP8 parents, relative to their norm
SIZES = {
    "1 GB": {},
    "8 GB, more tensors": {"layers": 102},
    "8 GB, larger tensors": {"hidden": 1536, "width": 576, "experts": 122},
}
FP8_SIZES = {
    "8 experts": {"layers": 1, "experts": 8, "hidden": 512, "width": 192},
    "64 experts": {"layers": 6, "experts": 64, "hidden": 1024, "width": 384},
}


def run(command: list[str], **variables: str) -> dict[str, float]:
    """Wall and CPU seconds and peak anonymous MB of one command; it has to succeed."""
    peak = 0
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=output, stderr=output
        )
        status = Path(f"/proc/{process.pid}/status")
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):  # absent once it is a zombie
                    peak = max(peak, int(line.split()[1]))
            time.sleep(SAMPLE_S)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "anon_mb": peak * 1.024e-3}


def dd(parents: Path, work: Path) -> dict[str, float]:
    """Seconds to read both parents and to write and sync one result, with dd's 1 MB blocks."""
    shards = sorted(parents.glob("parent_?/*.safetensors"))
    started = time.perf_counter()
    for shard in shards:
        subprocess.run(["dd", f"if={shard}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    read = time.perf_counter() - started
    megabytes = sum(path.stat().st_size for path in shards) // 2 // 1_000_000
    target, started = work / "dd.tmp", time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1MB", f"count={megabytes}"]
    subprocess.run([*command, "conv=fsync", "status=none"], check=True)
    write = time.perf_counter() - started
    target.unlink()
    return {"read_s": read, "write_s": write, "bound_s": read + write}


def evict(parents: Path) -> None:
    """Put the parents out of the page cache."""
    for shard in parents.glob("parent_?/*.safetensors"):
        descriptor = os.open(shard, os.O_RDONLY)
        os.fsync(descriptor)  # what is not written yet stays
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def recipe(path: Path, parents: Path, shares: tuple[float, float] = SHARES) -> Path:
    """A linear recipe for dvpa."""
    data = {
        "parents": {name[-1]: str(parents / name) for name in ("parent_a", "parent_b")},
        "base": "a",
        "rules": [{"match": "all", "lambda": dict(zip("ab", shares, strict=True))}],
    }
    path.write_text(yaml.safe_dump(data))
    return path


def dvpa(parents: Path, work: Path, *options: str) -> dict[str, float]:
    """One merge by dvpa, its result left in WORK/dvpa."""
    out = work / "dvpa"
    shutil.rmtree(out, ignore_errors=True)
    file = recipe(work / "dvpa.yaml", parents)
    return run([sys.executable, "-m", "dvpa", "assemble", str(file), str(out), *options])


def mergekit(
    program: str, parents: Path, work: Path, options: list[str], **variables: str
) -> dict[str, float]:
    """One merge by mergekit, its result left in WORK/mergekit."""
    out = work / "mergekit"
    shutil.rmtree(out, ignore_errors=True)
    models = [
        {"model": str(parents / name), "parameters": {"weight": share}}
        for name, share in zip(("parent_a", "parent_b"), SHARES, strict=True)
    ]
    data = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
    (work / "mergekit.yaml").write_text(yaml.safe_dump(data))
    command = [program, str(work / "mergekit.yaml"), str(out), "--lazy-unpickle"]
    command += ["--no-copy-tokenizer", "--quiet", *options]
    variables |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
    return run(command, **variables)


def start_up(work: Path) -> float:
    """Wall seconds of `dvpa assemble` on parents of next to nothing; median of three."""
    shutil.rmtree(work / "tiny", ignore_errors=True)
    make_parents(work / "tiny", layers=1, experts=8, hidden=64, width=32)
    file, times = recipe(work / "tiny.yaml", work / "tiny"), []
    for number in range(3):
        out = str(work / f"tiny_out_{number}")
        shutil.rmtree(out, ignore_errors=True)
        times.append(run([sys.executable, "-m", "dvpa", "assemble", str(file), out])["wall_s"])
    return statistics.median(times)


def fp8_case(work: Path, parents_label: str, sizes: dict[str, int]) -> dict[str, Any]:
    """FP8 parents: 0.5 A + 0.5 B in time, and against the exact interpolation."""
    parents, out = work / "fp8", work / "fp8_out"
    num_bytes = make_parents(parents, **sizes, fp8=True)
    file = recipe(work / "fp8.yaml", parents, (0.5, 0.5))
    timed = run([sys.executable, "-m", "dvpa", "assemble", str(file), str(out)])
    readers = [ShardReader(folder) for folder in (parents / "parent_a", parents / "parent_b", out)]
    errors, merged = [], []
    for name in readers[0].tensors:
        if f"{name}{SCALE}" not in readers[0].tensors:
            continue
        left, right, result = (
            dequantise(reader.read(name), reader.read(name + SCALE)) for reader in readers
        )
        exact = 0.5 * left + 0.5 * right
        errors.append(float((result - exact).norm() / exact.norm()))
        if not left.equal(right):
            merged.append(errors[-1])
    for folder in (parents, out):
        shutil.rmtree(folder)
    return {
        **timed,
        "parents": parents_label,
        "gb": num_bytes / 1e9,
        "tensors": len(readers[0].tensors),
        "mean_error": statistics.fmean(errors),
        "mean_error_of_merged": statistics.fmean(merged),
        "largest_error": max(errors),
    }


def rounding(distance: float | None) -> dict[str, float]:
    """E4M3's relative error (Frobenius) for the middle of two FP8 matrices of normal values, that
    far apart relative to their norm; None: for one matrix that no codes stand for yet. `largest`:
    every block's largest value is 448; `least`: at the scales that dvpa takes.
    """
    generator = torch.Generator().manual_seed(0)
    left, noise = torch.randn(2, 1024, 1024, generator=generator)
    exact, scales = left, ()
    if distance is not None:
        parents = [quantise(left), quantise(left + distance * noise)]
        exact = (dequantise(*parents[0]) + dequantise(*parents[1])) / 2
        scales = tuple(scale for _, scale in parents)
    found = {"largest": quantise(exact), "least": requantise(exact, scales)}
    return {
        name: float((dequantise(*each) - exact).norm() / exact.norm())
        for name, each in found.items()
    }


def memory_by_size(work: Path) -> list[dict[str, Any]]:
    """Peak anonymous memory, with two threads, of parents of 1 GB and 8 GB."""
    rows = []
    for label, sizes in SIZES.items():
        parents = work / "sized"
        num_bytes = make_parents(parents, **sizes)
        count = len(ShardReader(parents / "parent_a").tensors)
        peak = dvpa(parents, work, "--threads", "2")["anon_mb"]
        rows.append({"parents": label, "gb": num_bytes / 1e9, "tensors": count, "anon_mb": peak})
        print(rows[-1], flush=True)
        shutil.rmtree(parents)
        shutil.rmtree(work / "dvpa")
    return rows


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of every column."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit", metavar="PROGRAM", help="mergekit-yaml of its own environment"
    )
    parser.add_argument("--parents", type=Path, help="folder of parent_a and parent_b (1 GB each)")
    parser.add_argument("--work", type=Path, help="a folder on the disk to be measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/assemble.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "assemble"}
    if arguments.out.is_file():
        result = json.loads(arguments.out.read_text())
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        if "merge" in arguments.parts:
            result["merge"] = measure(arguments, work)
        if "cold" in arguments.parts:
            result["cold"] = measure(arguments, work, is_cold=True)
        if "fp8" in arguments.parts:
            result["fp8"] = [fp8_case(work, *case) for case in FP8_SIZES.items()]
        if "rounding" in arguments.parts:
            by_distance = {str(distance): rounding(distance) for distance in DISTANCES}
            result["rounding"] = {"normal_values": rounding(None), "by_distance": by_distance}
        if "sizes" in arguments.parts:
            result["sizes"] = memory_by_size(work)
    if {"merge", "cold"} & {*arguments.parts} or "environment" not in result:
        result["environment"] = describe_environment()  # of the timings
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def rounds_of(
    arguments: argparse.Namespace, parents: Path, work: Path, is_cold: bool
) -> dict[str, list[dict[str, float]]]:
    """All contenders, interleaved, each right after dd."""
    contenders = {"dvpa": lambda: dvpa(parents, work)}
    if arguments.mergekit:
        for label, (options, variables) in MERGEKIT.items():
            contenders[label] = lambda options=options, variables=variables: mergekit(
                arguments.mergekit, parents, work, options, **variables
            )
    dvpa(parents, work)  # the parents are in the page cache from here on
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name, contender in contenders.items():
            os.sync()  # what the last one left to be written is not this one's to wait for
            if is_cold:
                evict(parents)
            bound = dd(parents, work)
            if is_cold:
                evict(parents)
            rows[name].append({**contender(), **bound})
            print(number, name, rows[name][-1], flush=True)
    return rows


def measure(arguments: argparse.Namespace, work: Path, is_cold: bool = False) -> dict[str, Any]:
    """Rounds of all contenders, and whether their results agree."""
    parents = arguments.parents or work / "parents"
    if not parents.exists():
        make_parents(parents)
    rows = rounds_of(arguments, parents, work, is_cold)
    reader = ShardReader(parents / "parent_a")
    start = start_up(work)
    result: dict[str, Any] = {
        "parents": {
            "made_by": "make_parents.py" if arguments.parents else "scripts/assemble_parents.py",
            "tensors": len(reader.tensors),
            "gb": sum(info.num_bytes for info in reader.tensors.values()) / 1e9,
            "shards": len(reader.files),
        },
        "rounds": arguments.rounds,
        "rows": rows,
        "medians": {name: medians(each) for name, each in rows.items()},
        "start_up_s": start,
        "over_bound": statistics.median(
            (row["wall_s"] - start) / row["bound_s"] for row in rows["dvpa"]
        ),
        "exactness": exactness(parents, work / "dvpa", SHARES),
        "mergekit": None,
        "load": os.getloadavg()[0],
    }
    if arguments.mergekit:
        walls = {name: row["wall_s"] for name, row in result["medians"].items()}
        ours = walls.pop("dvpa")
        fastest = min(walls, key=lambda name: walls[name])
        result["mergekit"] = {
            "version": version_of(arguments.mergekit),
            "fastest": fastest,
            "times_faster": walls[fastest] / ours,
            "import_s": run(
                [
                    str(Path(arguments.mergekit).parent / "python"),
                    "-c",
                    "import mergekit.scripts.run_yaml",
                ],
                PYTHONPATH="",
            ),
            **beside_mergekit(work / "dvpa", work / "mergekit"),
        }
        shutil.rmtree(work / "mergekit")
    shutil.rmtree(work / "dvpa")
    return result


def python_of(program: str) -> str:
    """The interpreter beside a program of a virtual environment."""
    return str(Path(program).parent / "python")


def version_of(program: str) -> str:
    """mergekit's and its PyTorch's versions."""
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    done = subprocess.run(
        [python_of(program), "-c", code], capture_output=True, text=True, check=True
    )
    merge, pytorch = done.stdout.split()
    return f"{merge} (torch {pytorch})"


if __name__ == "__main__":
    main()
