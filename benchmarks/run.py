"""`python -m benchmarks.run`: our calls beside torch's in the same process, on the CPU; a table, and JSON in `benchmarks/results`.

python -m benchmarks.run [--dtype float32] [--only 1024] [--backend MATH] [--seconds 4] [--save NAME]
"""

from __future__ import annotations

import argparse
import math
import pathlib
import platform
import sys
from typing import Any

from benchmarks import peers, saved, timing
from benchmarks.cases import CPU_CASES, CPU_DTYPES
from jax_sdpa.attention import SDPBackend


def machine() -> dict[str, Any]:
    """Versions, processor and threads."""
    import torch

    info = pathlib.Path("/proc/cpuinfo")
    described = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in described if line.startswith("model name")), platform.processor())
    facts = {"processor": model, "torch capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return saved.machine(**facts, torch=torch.__version__, python=platform.python_version())


def measure(dtype: str, mode: str, only: str, backend: SDPBackend | None, seconds: float) -> list[dict[str, object]]:
    rows = []
    for case in CPU_CASES:
        if mode not in case.passes or only not in case.name:
            continue
        if (wrong := peers.error(case, dtype)) > 4:
            raise SystemExit(f"{case.name} {dtype}: our error is {wrong:.1f} times torch's; nothing is timed that is not right.")
        own, program = peers.ours(case, dtype, mode, backend)
        mine, theirs = timing.interleaved([own, peers.torch_sdpa(case, dtype, mode)], seconds)
        row = {
            "case": case.name, "dtype": dtype, "pass": mode, "ours_ms": 1e3 * mine["median"], "torch_ms": 1e3 * theirs["median"],
            "ratio": mine["median"] / theirs["median"], "ratio_of_min": mine["min"] / theirs["min"], "runs": mine["runs"],
            "temporaries_mb": program.memory_analysis().temp_size_in_bytes / 2**20, "error_over_torch": wrong,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{case.name:38s} {dtype:9s} {mode:17s} ours {row['ours_ms']:8.2f} ms  torch {row['torch_ms']:8.2f} ms  "
            f"ratio {row['ratio']:.2f} (min {row['ratio_of_min']:.2f})  {row['temporaries_mb']:.0f} MB",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=CPU_DTYPES, default=None)
    parser.add_argument("--pass", dest="mode", choices=("forward", "forward+backward"), default=None)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--backend", choices=[b.name for b in SDPBackend], default=None, help="default: our own choice")
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--save", default=None, help=saved.HELP)
    args = parser.parse_args(argv)
    backend = None if args.backend is None else SDPBackend[args.backend]
    rows: list[dict[str, object]] = []
    for dtype in [args.dtype] if args.dtype else CPU_DTYPES:
        for mode in [args.mode] if args.mode else ["forward", "forward+backward"]:
            group = measure(dtype, mode, args.only, backend, args.seconds)
            rows += group
            if group:
                mean = math.exp(sum(math.log(float(row["ratio"])) for row in group) / len(group))  # type: ignore[arg-type]
                print(f"== {dtype} {mode}: geometric mean of ours/torch {mean:.3f}", flush=True)
    if args.save:
        saved.save(args.save, machine(), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
