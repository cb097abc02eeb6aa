"""Configurations of one pass beside one another: lowered where there is time, timed where there is a GPU.

python -m benchmarks.variants export DIR [--only D128] [--variant fused] [--backward]   # no GPU needed: half a second for each
python -m benchmarks.variants time DIR [--rounds 2]                   # compiles what was exported, in threads; times it

--backward: the kernels of the backward alone, 2.5 times the forward's FLOPs, without a peer (torch's autograd has both passes).

Lowering is Python's work, one variant after another, and a GPU is too dear to wait for it. What is varied is written in `variants`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.experimental.pallas import mosaic_gpu  # noqa: F401 (the runtime that exported kernels call)

from benchmarks.cases import GPU_CASES, Case
from benchmarks.gpu import cotangent, device_time, operands
from benchmarks.gpu_peers import torch_backends
from jax_sdpa import dropout
from jax_sdpa.attention.bias import causal, sliding_window
from pallas_kernels import backward_tuning, dense, flash_attention, flash_backward, tuning
from pallas_kernels.contracts import BackwardConfig, ForwardConfig, WalkConfig
from pallas_kernels.visits import cdiv


def variants(case: Case) -> dict[str, ForwardConfig | None]:
    """By name; None is what `tuning` chooses."""
    found: dict[str, ForwardConfig | None] = {"tuned": None}
    _, more = jax.eval_shape(lambda: operands(case))
    bias = more if case.extra.startswith("bias") else None
    bias_bytes, keyed = dense.tile_bytes(bias), dense.is_keyed(bias)
    tuned = flash_attention.chosen(
        heads=case.batch * case.q_heads, group=case.q_heads // case.kv_heads, query_len=case.query_len, key_len=case.key_len,
        head_dim=case.head_dim, value_head_dim=case.head_dim, mask=structured(case, more), bias_bytes=bias_bytes,
        keyed=keyed, keep=more if case.extra.startswith("bool") else None, drops=case.extra == "dropout",
    )  # fmt: skip
    middle = {name: getattr(tuned, name) for name in ("q_registers", "pinned", "spread")}
    three = {"warpgroups": 3, "registers": (160, 32), "pinned": True}
    bases: dict[int, dict[str, dict[str, Any]]] = {
        64: {"": three, "4 stages, ": {**three, "stages": 4}, "two, ": {}}, 128: {"": middle},
        **{dim: {"": {"block_k": 64}} for dim in (192, 256)},
    }  # fmt: skip
    for name, base in bases[case.head_dim].items():
        rows = ForwardConfig(**base).rows
        resident = cdiv(case.batch * case.q_heads * cdiv(case.query_len, rows), tuning.SMS)  # one program an SM
        for n in sorted({1, 2, resident}):
            for queries in (2, 1):
                read = 4 * case.key_len * case.head_dim * case.kv_heads // case.q_heads
                together = tuning.side_by_side(cdiv(case.query_len, rows), read) if case.causal and n == 1 else 1
                config = ForwardConfig(**base, row_tiles=n, queries=queries, together=together)
                fits = tuning.shared_bytes(config, case.head_dim, case.head_dim, bias_bytes, keyed) <= tuning.SHARED_MEMORY
                if fits and f"{name}{n}" not in found and (queries == 1 or n > 1):
                    found[f"{name}{n}"] = config
    return found


def structured(case: Case, more: Any) -> Any:
    """The mask that is no array, or None."""
    mask = sliding_window(1023, 0) if case.extra == "window" else more if case.extra == "lengths" else None
    if case.causal:
        mask = causal() if mask is None else causal() & mask
    return mask


def drops(case: Case) -> dict[str, Any]:
    """The arguments of dropout, where the case has it."""
    if case.extra != "dropout":
        return {}
    return {"seeds": dropout.seeds(jax.random.key(1), case.batch, case.q_heads), "dropout_p": 0.1, "generator": dropout}


def call(case: Case, config: ForwardConfig | None, q: Any, k: Any, v: Any, more: Any) -> Any:
    """The launch itself, on arrays (B, H, L, D)."""
    options: dict[str, Any] = {}
    if case.extra.startswith("bool"):
        options["keep"] = more
    elif case.extra.startswith("bias"):
        options["bias"] = more
    options |= drops(case)
    mask = structured(case, more)
    mask = None if mask is None else mask.with_batch((case.batch,))
    return flash_attention.forward(q, k, v, layout="BHLE", scale=case.head_dim**-0.5, mask=mask, config=config, **options)


def backward_variants(case: Case) -> dict[str, BackwardConfig | None]:
    """By name; None is what `tuning` chooses."""
    found: dict[str, BackwardConfig | None] = {"tuned": None}
    base = backward_tuning.backward_config(
        heads=case.batch * case.q_heads, group=case.q_heads // case.kv_heads, query_len=case.query_len, key_len=case.key_len,
        head_dim=case.head_dim, value_head_dim=case.head_dim, masked=case.causal, sloped=case.causal, cut_once=case.causal,
        seen=case.key_len / (1 + case.causal), drops=case.extra == "dropout",
    )  # fmt: skip

    def of(**own: WalkConfig) -> BackwardConfig:
        dims = {"head_dim": case.head_dim, "value_head_dim": case.head_dim, "drops": case.extra == "dropout"}
        return dataclasses.replace(base, **{name: backward_tuning.fitted(name, one, **dims) for name, one in own.items()})

    def several(own: WalkConfig, heads: int, length: int, of_heads: int = 1) -> dict[str, WalkConfig]:
        """With 1, 2 and as many row tiles as an SM gets; of_heads: query heads that read the same."""
        resident = cdiv(heads * own.split * cdiv(length, own.rows), tuning.SMS)
        side = tuning.side_by_side(cdiv(length, own.rows), 4 * length * case.head_dim // of_heads) if case.causal else 1
        return {
            f"{n} row tiles": dataclasses.replace(own, row_tiles=n, together=side if n == 1 else 1)
            for n in ([1] if own.alone else sorted({1, min(2, resident), resident}))
        }

    heads, group = case.batch * case.kv_heads, case.q_heads // case.kv_heads
    found |= {f"dq {name}": of(dq=own) for name, own in several(base.dq, heads * group, case.query_len, group).items()}
    for part, one in {"dkv": base.dkv, "dk": base.dk, "dv": base.dv}.items():
        if one is not None and (part == "dkv") == (base.dkv is not None):
            found |= {f"{part} {name}": of(**{part: own}) for name, own in several(one, heads, case.key_len).items()}
    if case.q_heads > case.kv_heads and not (base.dkv or base.dk).alone:
        for n in (1, 2, 4):
            found[f"dkv split {n}"] = of(dkv=dataclasses.replace(base.dkv or base.dk, split=n))
    if case.head_dim <= 128:
        own = WalkConfig(**backward_tuning.FUSED, split=base.dkv.split if base.dkv else 1)
        own = several(own, heads, case.key_len)["1 row tiles"]
        for stages in (2, 3):
            for name, half in {"": False, ", half p": True}.items():
                found[f"fused, {stages} stages{name}"] = of(fused=dataclasses.replace(own, stages=stages, half=half))
    precisions = {"half p": True, "float32 p": False}
    for name, half in precisions.items():
        for more in ({}, {"masks_all": not base.dq.masks_all}) if case.causal else ({},):
            own = dataclasses.replace(base.dq, early=True, plain=False, half=half, **more)
            found[f"dq early, {name}{', all masked' if own.masks_all else ''}"] = of(dq=own)
    if case.head_dim > 128:
        for name, half in precisions.items():
            own = WalkConfig(roles=True, plain=True, half=half)
            found |= {f"dkv roles, {name}, {n}": of(dkv=one) for n, one in several(own, heads, case.key_len).items()}
            found[f"dkv roles, {name}, 3 stages"] = of(dkv=dataclasses.replace(own, stages=3))
            found[f"dkv roles, {name}, all masked"] = of(dkv=dataclasses.replace(own, masks_all=True))
    if case.head_dim == 256:
        found["dq not plain"] = of(dq=WalkConfig(masks_all=True, brief=1))
        found["dq one warpgroup"] = of(dq=WalkConfig(warpgroups=1, masks_all=True))
        found["dk one warpgroup"] = of(dk=WalkConfig(warpgroups=1, masks_all=True, half=True))
        found["dv half"] = of(dv=WalkConfig(masks_all=True, half=True))
    return found


PARTS = {"all": ("query", "key", "value"), "dq": ("query",), "dkv": ("key", "value"), "dk": ("key",), "dv": ("value",)}
"""What a program makes, by the first word of the variants that change it."""


def backward_call(
    case: Case, config: BackwardConfig | None, wants: tuple[str, ...], q: Any, k: Any, v: Any, dout: Any, lse: Any, delta: Any
) -> Any:
    mask = causal().with_batch((case.batch,)) if case.causal else None
    found = flash_backward.backward(
        q, k, v, dout, lse, delta, layout="BHLE", scale=case.head_dim**-0.5, mask=mask, wants=wants, config=config,
        **drops(case),
    )  # fmt: skip
    return [found[name] for name in wants]


def backward_operands(case: Case) -> list[Any]:
    (q, k, v), _ = operands(case)
    dout = cotangent(q)
    mask = causal().with_batch((case.batch,)) if case.causal else None
    out, lse = flash_attention.forward(q, k, v, layout="BHLE", scale=case.head_dim**-0.5, mask=mask, **drops(case))
    return [q, k, v, dout, lse, flash_backward.row_deltas(out, dout, None, 1)]


def export_all(directory: pathlib.Path, only: str, backward: bool, variant: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    index: list[dict[str, str]] = []

    def add(case: Case, name: str, program: Any, *given: Any) -> None:
        if variant not in name and not name.startswith("tuned"):
            return
        path = directory / f"{len(index)}.bin"
        path.write_bytes(export.export(jax.jit(program), platforms=["cuda"])(*given).serialize())
        index.append({"case": case.name, "variant": name, "file": path.name, "pass": "backward" if backward else "forward"})

    for case in GPU_CASES:
        if only not in case.name or case.extra == "segments":
            continue
        if backward:
            if case.extra not in ("", "dropout"):
                continue
            (q, k, v), _ = jax.eval_shape(lambda case=case: operands(case))
            row = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
            for name, config in backward_variants(case).items():
                changed = {"tuned": PARTS, "fused": ("all",)}.get(name.split()[0].rstrip(","), (name.split()[0],))
                for part in changed:
                    run = functools.partial(backward_call, case, config, PARTS[part])
                    add(case, f"{name}: {part}", run, q, k, v, q, row, row)
            continue
        (q, k, v), more = jax.eval_shape(lambda case=case: operands(case))
        for name, config in variants(case).items():
            tree = jax.tree.structure(more)  # an export knows no masks: it takes their arrays

            def run(q: Any, k: Any, v: Any, leaves: Any, case: Case = case, config: Any = config, tree: Any = tree) -> Any:
                return call(case, config, q, k, v, jax.tree.unflatten(tree, leaves))

            add(case, name, run, q, k, v, jax.tree.leaves(more))
    (directory / "index.json").write_text(json.dumps(index))
    print(f"{len(index)} programs in {directory}")


def time_all(directory: pathlib.Path, rounds: int) -> None:
    index = json.loads((directory / "index.json").read_text())

    def compiled(entry: dict[str, str]) -> Any:
        program = export.deserialize(bytearray((directory / entry["file"]).read_bytes()))
        given = jax.tree.unflatten(program.in_tree, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals])[0]
        return jax.jit(program.call).lower(*given).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, index))
    for case in GPU_CASES:
        own = [(entry["variant"], program) for entry, program in zip(index, programs, strict=True) if entry["case"] == case.name]
        if not own:
            continue
        if index[0]["pass"] == "backward":
            given = jax.jit(functools.partial(backward_operands, case))()
            time_backward(case, {name: functools.partial(program, *given) for name, program in own}, rounds)
            continue
        arrays, more = operands(case)
        calls = {name: functools.partial(program, *arrays, jax.tree.leaves(more)) for name, program in own}
        first = next(iter(calls.values()))()[0].astype(jnp.float32)
        for name, one in calls.items():
            if not float(jnp.abs(one()[0].astype(jnp.float32) - first).max()) < 0.05:
                raise SystemExit(f"{case.name}, {name}: not the numbers of the first variant.")
        calls |= {name: peer for name, peer in torch_backends(case, arrays, more).items() if name == "torch CUDNN"}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, one in calls.items():
                times[name].append(device_time(one))
        figures = (f"{name} {case.flops / statistics.median(each) / 1e12:.0f}" for name, each in times.items())
        print(f"{case.name:36s}{'  '.join(figures)}", flush=True)


def time_backward(case: Case, calls: dict[str, Any], rounds: int) -> None:
    """Of all three gradients FLOPs count 2.5 times the forward's; a part's figure is its time."""
    first = dict(zip(PARTS["all"], calls["tuned: all"](), strict=True))
    for name, one in calls.items():
        for which, x in zip(PARTS[name.split(": ")[1]], one(), strict=True):
            size = float(jnp.abs(first[which].astype(jnp.float32)).max())
            if not float(jnp.abs(x.astype(jnp.float32) - first[which].astype(jnp.float32)).max()) < 0.02 * size:
                raise SystemExit(f"{case.name}, {name}: not the numbers of the first variant.")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, one in calls.items():
            times[name].append(device_time(one))
    print(case.name)
    for name, each in times.items():
        seconds = statistics.median(each)
        speed = f"  {2.5 * case.flops / seconds / 1e12:.0f} TFLOP/s" if name.endswith(": all") else ""
        print(f"    {name:36s}{1e6 * seconds:9.1f} us{speed}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "time"))
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--variant", default="", help="what is tuned, and variants whose name contains this")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backward", action="store_true", help="export configurations of the backward")
    args = parser.parse_args(argv)
    if args.what == "export":
        export_all(args.directory, args.only, args.backward, args.variant)
    else:
        time_all(args.directory, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
