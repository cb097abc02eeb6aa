"""`python -m benchmarks.multi_gpu`: forward and backward over several devices against one of them; JSON to a path.

python -m benchmarks.multi_gpu --save PATH [--only batch] [--devices 2] [--length 65536] [--batch-length 8192] [--head-dim 128]

Ring attention (causal, zig-zag and in order), all-to-all, and batch sharding; wall-clock medians, calls taking turns. Correctness
comes first: each way against float32 on one device, beside what one device's own call makes of the same halves; nothing is timed
that is more than twice as wrong. Then the bits of two runs are compared. Aims for two H200s: 1.8 times one GPU's throughput by the
ring at 65536 tokens, 1.95 times by the batch.

On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=2 and small sizes (its devices share the same cores, so it shows that the
script runs, and no speedup).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import saved, timing
from jax_sdpa import scaled_dot_product_attention
from jax_sdpa.sharding import context_parallel_attention, explain_context_parallel, from_zigzag, to_zigzag

Call = Callable[..., Any]
SEQUENCE, BATCH = PartitionSpec(None, None, "x"), PartitionSpec("x")


def operands(batch: int, heads: int, length: int, head_dim: int, dtype: Any) -> list[jax.Array]:
    """q, k, v and the output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (batch, heads, length, head_dim), dtype) for key in keys]


def both_passes(call: Call) -> Call:
    def run(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, ...]:
        out, pullback = jax.vjp(call, q, k, v)
        return out, *pullback(dout)

    return jax.jit(run)


def alone(q: Any, k: Any, v: Any) -> Any:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def over(mesh: Mesh, **options: Any) -> Call:
    return lambda q, k, v: context_parallel_attention(q, k, v, is_causal=True, mesh=mesh, axis_name="x", **options)


def ways(mesh: Mesh) -> dict[str, tuple[Call, PartitionSpec, bool]]:
    """{name: (call, where its operands lie, whether they are in zig-zag)}"""
    return {
        "ring, zig-zag": (over(mesh, method="ring", order="zigzag"), SEQUENCE, True),
        "ring, in order": (over(mesh, method="ring"), SEQUENCE, False),
        "all-to-all": (over(mesh, method="all_to_all"), SEQUENCE, False),
        "batch": (alone, BATCH, False),
    }


def placed(arrays: list[jax.Array], mesh: Mesh, spec: PartitionSpec, zigzag: bool) -> list[jax.Array]:
    n = mesh.devices.size
    arrays = [to_zigzag(x, n) for x in arrays] if zigzag else arrays
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]


def errors(mesh: Mesh, arrays: list[jax.Array]) -> dict[str, list[float]]:
    """||got - exact|| / ||exact|| of out, dq, dk, dv, by one device ("alone") and by each way."""
    with jax.default_matmul_precision("highest"):
        exact = both_passes(alone)(*(x.astype(jnp.float32) for x in arrays))

    def wrong(got: Any) -> list[float]:
        gaps = (np.asarray(x, np.float64) - np.asarray(y, np.float64) for x, y in zip(got, exact, strict=True))
        return [float(np.linalg.norm(gap) / np.linalg.norm(np.asarray(y, np.float64))) for gap, y in zip(gaps, exact, strict=True)]

    found = {"alone": wrong(both_passes(alone)(*arrays))}
    for name, (call, spec, zigzag) in ways(mesh).items():
        got = both_passes(call)(*placed(arrays, mesh, spec, zigzag))
        found[name] = wrong([from_zigzag(x, mesh.devices.size) for x in got] if zigzag else got)
        worse = [name for own, honest in zip(found[name], found["alone"], strict=True) if own > 2 * honest + 1e-6]
        if worse:
            raise SystemExit(f"{name}: errors {found[name]}, one device's {found['alone']}; nothing is timed that is not right.")
    return found


def same_bits(program: Any, arrays: list[jax.Array]) -> bool:
    first, second = (jax.device_get(program(*arrays)) for _ in range(2))
    return all(x.tobytes() == y.tobytes() for x, y in zip(first, second, strict=True))


def measure(mesh: Mesh, name: str, arrays: list[jax.Array], seconds: float) -> dict[str, Any]:
    """One way against one device, on the same operands."""
    call, spec, zigzag = ways(mesh)[name]
    here, there = jax.device_put(arrays, mesh.devices.flat[0]), placed(arrays, mesh, spec, zigzag)
    one, several = both_passes(alone).lower(*here).compile(), both_passes(call).lower(*there).compile()
    times = timing.interleaved(
        [lambda: jax.block_until_ready(one(*here)), lambda: jax.block_until_ready(several(*there))], seconds
    )  # fmt: skip
    B, H, L, E = arrays[0].shape
    flops = 3.5 * 2 * B * H * L * L * E
    seconds_of = [own["median"] for own in times]
    return {
        "way": name, "batch": B, "heads": H, "length": L, "head_dim": E, "one_ms": 1e3 * seconds_of[0], "ms": 1e3 * seconds_of[1],
        "speedup": seconds_of[0] / seconds_of[1], "tflops": [flops / s / 1e12 for s in seconds_of], "runs": times[0]["runs"],
        "same_bits": same_bits(several, there), "temporaries_mb": several.memory_analysis().temp_size_in_bytes / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=pathlib.Path, required=True, help="where the JSON goes")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--length", type=int, default=65536, help="of the ring and the all-to-all")
    parser.add_argument("--batch-length", type=int, default=8192, help="of the batch, which has 4 entries a device")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    args = parser.parse_args()
    if len(jax.devices()) < args.devices:
        raise SystemExit(f"{args.devices} devices are wanted, {len(jax.devices())} are here.")
    mesh = Mesh(np.array(jax.devices()[: args.devices]), ("x",))
    shape = (args.heads, args.length, args.head_dim)
    like = jax.ShapeDtypeStruct((1, *shape), args.dtype)
    plan = explain_context_parallel(like, like, like, is_causal=True, mesh=mesh, axis_name="x", method="ring", grad=True)
    print(plan, flush=True)
    wrong = errors(mesh, operands(args.devices, args.heads, min(args.length, 4096), args.head_dim, args.dtype))
    print("errors", json.dumps(wrong), flush=True)
    rows = []
    for name in (name for name in ways(mesh) if args.only in name):
        batch, length = (4 * args.devices, args.batch_length) if name == "batch" else (1, args.length)
        rows.append(measure(mesh, name, operands(batch, args.heads, length, args.head_dim, args.dtype), args.seconds))
        print(json.dumps(rows[-1]), flush=True)
    kinds = [device.device_kind for device in mesh.devices.flat]
    machine = saved.machine(devices=kinds, python=platform.python_version(), dtype=args.dtype)
    saved.save(args.save, machine, errors=wrong, rows=rows, plan=str(plan))


if __name__ == "__main__":
    main()
