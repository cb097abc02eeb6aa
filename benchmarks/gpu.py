"""`python -m benchmarks.gpu`: the forward, or both passes, on a GPU beside its peers; device time; JSON.

python -m benchmarks.gpu [--backward] [--only D128] [--rounds 3] [--jax-nn] [--save NAME] [--export DIR | --programs DIR]

One process. --backward: forward and gradients of query, key and value together, 3.5 times the forward's FLOPs. The peers are
torch's backends, with --jax-nn jax.nn's cuDNN, and where they are installed tokamax (its Mosaic GPU kernels) and FlashAttention-4;
all but torch's get arrays of their own layout, (B, L, H, E). One that raises is left out of the row and says why.

Each call runs a few times under CUPTI (torch's profiler sees JAX's kernels too) and what its kernels take on the device is added
up: launch gaps and the host do not count. Calls take turns in `rounds`; a figure is their median. Errors come first:
||out - exact|| / ||exact|| against torch's EFFICIENT in float32, ours beside the peers'; only ours must be right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch lives on the same GPU

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental.pallas import mosaic_gpu  # noqa: F401 (the runtime that exported kernels call)

from benchmarks import saved
from benchmarks.cases import GPU_CASES, PACKED, Case
from benchmarks.gpu_peers import error, exact, peers, versions
from jax_sdpa import explain, scaled_dot_product_attention
from jax_sdpa.attention.bias import KeyLengths, Packed, SegmentIds, causal, sliding_window
from jax_sdpa.device import assume_device


def operands(case: Case) -> tuple[list[jax.Array], Any]:
    """([query, key, value], what else the call takes)."""
    S = case.key_len
    keys = jax.random.split(jax.random.key(0), 4)
    kv = (case.batch, case.kv_heads, S, case.head_dim)
    shapes = (case.batch, case.q_heads, case.query_len, case.head_dim), kv, kv
    arrays = [jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=False)]
    more: Any = None
    if case.extra.startswith("bool padding"):
        more = jnp.broadcast_to(jnp.arange(S) < S - S // 8, (case.batch, 1, 1, S))
    elif case.extra.startswith("bool causal"):
        more = jnp.tril(jnp.ones((1, 1, case.query_len, S), bool))
    elif case.extra.startswith("bool"):
        more = jax.random.bernoulli(keys[3], 0.7, mask_shape(case))
    elif case.extra.startswith("bias"):
        more = jax.random.normal(keys[3], mask_shape(case), case.dtype if case.extra.startswith("bias16") else "float32")
    elif case.extra == "lengths":
        more = KeyLengths(jnp.full((case.batch,), S - S // 8, jnp.int32))
    elif case.extra == "segments":
        more = jnp.broadcast_to(jnp.arange(case.query_len) // (case.query_len // 8), (case.batch, case.query_len))
    elif case.extra == "packed":
        more = Packed(jnp.asarray(np.r_[0, PACKED.cumsum()], jnp.int32), right=0)
    return arrays, more


def mask_shape(case: Case) -> tuple[int, ...]:
    """What stands in brackets behind the name of a mask or a bias: '(B,1,L,S)'."""
    sizes = {"B": case.batch, "H": case.q_heads, "L": case.query_len, "S": case.key_len, "1": 1}
    return tuple(sizes[dim] for dim in case.extra[case.extra.index("(") + 1 : -1].split(","))


def mask_of(case: Case, more: Any) -> Any:
    """What the call takes as its mask; that of segments is made of the ids, as a layer would make it."""
    if case.extra == "segments":
        return SegmentIds(more)
    return sliding_window(1023, 0) if case.extra == "window" else more


def ours(case: Case, q: Any, k: Any, v: Any, more: Any) -> jax.Array:
    mask = mask_of(case, more)
    if case.causal and case.extra != "packed":
        mask = causal() if mask is None else causal() & mask
    drop = {"dropout_p": 0.1, "dropout_rng": jax.random.key(1)} if case.extra == "dropout" else {}
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **drop)


def both_passes(case: Case, q: Any, k: Any, v: Any, more: Any, dout: Any) -> tuple[jax.Array, ...]:
    """(out, dq, dk, dv)."""
    out, pullback = jax.vjp(lambda q, k, v: ours(case, q, k, v, more), q, k, v)
    return out, *pullback(dout)


def cotangent(query: jax.Array) -> jax.Array:
    """Of the output; head dims are the same here."""
    return jax.random.normal(jax.random.key(9), query.shape, query.dtype)


def device_time(call: Callable[[], Any]) -> float:
    """Seconds on the device, of all kernels that the call launches, over a few calls."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def wait(result: Any) -> None:
        jax.block_until_ready(result)
        torch.cuda.synchronize()

    wait(call())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    wait(call())
    end.record()
    torch.cuda.synchronize()
    n = max(3, min(20, int(10 / max(0.1, start.elapsed_time(end)))))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(n):
            result = call()
        wait(result)
    return 1e-6 / n * sum(e.device_time for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)


def program_of(case: Case, backward: bool) -> tuple[Any, list[Any]]:
    """(our call of the flat operands, their shapes)."""
    (q, k, v), more = jax.eval_shape(lambda: operands(case))
    leaves, tree = jax.tree.flatten((q, k, v, more, q) if backward else (q, k, v, more))
    run = both_passes if backward else ours
    return lambda *flat: run(case, *jax.tree.unflatten(tree, flat)), leaves


def compiled(case: Case, backward: bool, directory: pathlib.Path | None) -> Any:
    """Lowered here, or as it was exported into the directory."""
    program, leaves = program_of(case, backward)
    if directory is not None:
        program = export.deserialize(bytearray((directory / _file(case, backward)).read_bytes())).call
    return jax.jit(program).lower(*leaves).compile()


def export_all(cases: list[Case], backward: bool, directory: pathlib.Path) -> None:
    """Lowering is Python's work, for which no GPU need wait."""
    directory.mkdir(parents=True, exist_ok=True)
    for case in cases:
        program, leaves = program_of(case, backward)
        with assume_device("cuda:sm90"):
            exported = export.export(jax.jit(program), platforms=["cuda"])(*leaves)
        (directory / _file(case, backward)).write_bytes(exported.serialize())
    print(f"{len(cases)} programs in {directory}")


def _file(case: Case, backward: bool) -> str:
    return re.sub(r"\W+", "_", f"{case.name} {'both' if backward else 'forward'}") + ".bin"


def _check_packed(case: Case, got: Any, arrays: list[jax.Array], dout: Any) -> None:
    """The last sequence has the numbers that it has by itself."""
    n, end = int(PACKED[-1]), int(PACKED.sum())
    alone = dataclasses.replace(case, extra="", query_len=n, key_len=n)
    q, k, v, *rest = (x[:, :, end - n : end] for x in (*arrays, dout) if x is not None)
    expected = both_passes(alone, q, k, v, None, *rest) if rest else [ours(alone, q, k, v, None)]
    for x, wanted in zip(got if rest else [got], expected, strict=True):
        error = float(jnp.linalg.norm((x[:, :, end - n : end] - wanted).astype(jnp.float32)))
        error /= float(jnp.linalg.norm(wanted.astype(jnp.float32)))
        if not error < 5e-3:
            raise SystemExit(f"{case.name}: the last sequence by itself has other numbers, by {error}.")


def measure(case: Case, run: Any, rounds: int, jax_nn: bool, backward: bool) -> dict[str, Any]:
    arrays, more = operands(case)
    dout = cotangent(arrays[0]) if backward else None
    given = jax.tree.leaves((*arrays, more) if dout is None else (*arrays, more, dout))
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: run(*given), **peers(case, arrays, more, jax_nn, dout)}
    flops = case.flops * (3.5 if backward else 1)
    row: dict[str, Any] = {"case": case.name, "gflop": flops / 1e9}
    row["backend"] = str(explain(*arrays, mask_of(case, more), enable_gqa=True).backend.name)  # type: ignore[union-attr]
    if (reference := exact(case, arrays, more, dout)) is not None:
        row["errors"] = {name: error(name, call(), reference) for name, call in calls.items()}
        if not row["errors"]["ours"] <= 2 * row["errors"].get("torch CUDNN", 5e-3):
            raise SystemExit(f"{case.name}: our error is {row['errors']}; nothing is timed that is not right.")
        del reference
    if case.extra == "packed":
        _check_packed(case, calls["ours"](), arrays, dout)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(device_time(call))
    row["microseconds"] = {name: 1e6 * statistics.median(own) for name, own in times.items()}
    row["spread"] = {name: max(own) / min(own) - 1 for name, own in times.items()}
    row["tflops"] = {name: flops / us / 1e6 for name, us in row["microseconds"].items()}
    print(
        f"{case.name:36s}"
        + "  ".join(f"{name} {x:.0f}" for name, x in row["tflops"].items())
        + f"  [{row['microseconds']['ours']:.1f} us]",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--jax-nn", action="store_true", help="jax.nn's cuDNN as well")
    parser.add_argument("--save", default=None, help=saved.HELP)
    parser.add_argument(
        "--export", type=pathlib.Path, default=None, help="no GPU needed: only lower the programs, into this directory"
    )
    parser.add_argument("--programs", type=pathlib.Path, default=None, help="compile what was exported there")
    args = parser.parse_args(argv)
    chosen = [case for case in GPU_CASES if args.only in case.name]
    if args.export is not None:
        export_all(chosen, args.backward, args.export)
        return 0

    import torch

    machine = saved.machine(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version(), **versions()
    )
    print(machine, "TFLOP/s of device time", flush=True)
    rows = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(functools.partial(compiled, backward=args.backward, directory=args.programs), chosen))
    for case, program in zip(chosen, programs, strict=True):
        rows.append(measure(case, program, args.rounds, args.jax_nn, args.backward))
        torch.cuda.empty_cache()
        if args.save:  # after each row: what was measured stays when time runs out
            saved.save(args.save, machine, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
