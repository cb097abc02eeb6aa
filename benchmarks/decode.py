"""`python -m benchmarks.decode`: a decode step on a cache beside torch's SDPA, on the CPU, in the same process.

python -m benchmarks.decode [--dtype float32] [--seconds 10] [--save NAME]

8 sequences, 32 query heads and 8 key/value heads, 1 x 4096, head dim 128: a cache of 268 MB in float32, which no processor's cache
holds, so that a step's floor is the memory's. torch has no lengths: its peer gets them as a bool mask (B, 1, 1, S). Calls take
turns; `cores` is processor time over wall time of each one's calls, because a shared machine gives now two cores and now one, and a
ratio of unequal shares would be none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import saved
from benchmarks.peers import Call
from benchmarks.run import machine
from jax_sdpa import scaled_dot_product_attention
from jax_sdpa.attention.bias import KeyLengths

BATCH, Q_HEADS, KV_HEADS, SLOTS, HEAD_DIM = 8, 32, 8, 4096, 128
ROWS: dict[str, tuple[np.ndarray | None, np.ndarray | None]] = {
    "no lengths": (None, None),
    "lengths, all full": (np.full(BATCH, SLOTS), None),
    "lengths 512 to 4096": (np.linspace(512, SLOTS, BATCH).astype(int), None),
    "lengths of 256": (np.full(BATCH, 256), None),
    "left padding, half of the slots": (np.full(BATCH, SLOTS), np.full(BATCH, SLOTS // 2)),
}
"""(stops, starts) of the keys of each sequence."""


def _operands(dtype: str) -> tuple[Any, Any]:
    import torch

    rng = np.random.default_rng(0)
    shapes = [(BATCH, heads, length, HEAD_DIM) for heads, length in ((Q_HEADS, 1), (KV_HEADS, SLOTS), (KV_HEADS, SLOTS))]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    return [jnp.asarray(x, dtype) for x in arrays], [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]


def _calls(dtype: str, stops: np.ndarray | None, starts: np.ndarray | None) -> tuple[Call, Call, float, int]:
    """(ours, torch's, our error over torch's, our temporaries)."""
    import torch

    mine, theirs = _operands(dtype)
    arrays = [jnp.asarray(x, jnp.int32) for x in (stops, starts) if x is not None]
    at = np.arange(SLOTS)[None]
    keep = None if stops is None else (at < stops[:, None]) & (True if starts is None else at >= starts[:, None])
    mask = None if keep is None else torch.from_numpy(keep[:, None, None].copy())

    def attend(q: Any, k: Any, v: Any, *numbers: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, KeyLengths(*numbers) if numbers else None, enable_gqa=True)

    program = jax.jit(attend).lower(*mine, *arrays).compile()

    def peer(q: Any = theirs[0], k: Any = theirs[1], v: Any = theirs[2]) -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = peer(*(x.double() for x in theirs)).numpy()
    ours, torchs = np.asarray(program(*mine, *arrays), np.float64), peer().double().numpy()
    error = np.abs(ours - exact).max() / np.abs(torchs - exact).max()
    return lambda: jax.block_until_ready(program(*mine, *arrays)), peer, float(error), program.memory_analysis().temp_size_in_bytes


def _interleaved(calls: list[Call], seconds: float) -> list[dict[str, float]]:
    """{'median', 'min' in seconds, 'cores'} of each; three calls of each in a turn, of which the first is not timed."""
    times: list[list[float]] = [[] for _ in calls]
    busy = [0.0] * len(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for n, call in enumerate(calls):
            call()
            for _ in range(2):
                start, used = time.perf_counter(), time.process_time()
                call()
                times[n].append(time.perf_counter() - start)
                busy[n] += time.process_time() - used
    return [
        {"median": statistics.median(own), "min": min(own), "cores": used / sum(own)}
        for own, used in zip(times, busy, strict=True)
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=10.0, help="per row")
    parser.add_argument("--save", default=None, help=saved.HELP)
    args = parser.parse_args(argv)
    rows = []
    for name, (stops, starts) in ROWS.items():
        ours, peer, error, temporaries = _calls(args.dtype, stops, starts)
        if error > 4:
            raise SystemExit(f"{name}: our error is {error:.1f} times torch's; nothing is timed that is not right.")
        mine, theirs = _interleaved([ours, peer], args.seconds)
        row = {
            "case": name, "dtype": args.dtype, "ours_ms": 1e3 * mine["median"], "torch_ms": 1e3 * theirs["median"],
            "ratio": mine["median"] / theirs["median"], "ratio_of_min": mine["min"] / theirs["min"], "our_cores": mine["cores"],
            "torchs_cores": theirs["cores"], "temporaries_mb": temporaries / 2**20, "error_over_torch": error,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:32s} {args.dtype:9s} ours {row['ours_ms']:6.1f} ms ({row['our_cores']:.2f} cores)  "
            f"torch {row['torch_ms']:6.1f} ms ({row['torchs_cores']:.2f})  ratio {row['ratio']:.2f} "
            f"(min {row['ratio_of_min']:.2f})  {row['temporaries_mb']:.1f} MB",
            flush=True,
        )
    if args.save:
        saved.save(args.save, machine(), rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
