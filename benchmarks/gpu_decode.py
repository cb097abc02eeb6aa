"""`python -m benchmarks.gpu_decode`: decode on a GPU beside torch's backends; device time, bytes of the cache per second; JSON.

python -m benchmarks.gpu_decode [--only B64] [--rounds 3] [--variants] [--save NAME] [--export DIR | --programs DIR]

One query (28 heads on 4 of keys and values, head dim 128: Qwen2-7B's) to a cache of bfloat16. The floor is the cache, read once:
2 * B * 4 * S * 128 * 2 bytes over the chip's copy rate, 4.3 TB/s on an H200; 1.94 times less for the same cache in 8 bits, with a
float32 scale for each key of each head. Small caches stay in its L2 of 50 MB, ours and the peers' alike. Correctness comes first:
against the definition in float32, of what an 8-bit cache stands for.
--variants: the kernels' configurations, beside the tuned one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental.pallas import mosaic_gpu  # noqa: F401 (the runtime that exported kernels call)

from benchmarks import saved
from benchmarks.gpu import device_time
from jax_sdpa.attention.bias import KeyLengths
from pallas_kernels import flash_decode
from pallas_kernels.contracts import DecodeConfig
from pallas_kernels.decode_tuning import decode_config, eight_bit_config

Q_HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
EIGHT_BITS = jnp.int8, jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Decode:
    """lengths: 'full', or 'mixed', from S / 8 to S within the batch; page: of a paged cache, pages in a random order."""

    name: str
    batch: int
    key_len: int
    lengths: str = "full"
    page: int | None = None
    queries: int = 1

    @property
    def keys(self) -> np.ndarray:
        """(B,): each sequence's."""
        if self.lengths == "full":
            return np.full(self.batch, self.key_len)
        return np.linspace(self.key_len // 8, self.key_len, self.batch).astype(int)

    @property
    def bytes(self) -> float:
        return 2.0 * 2 * KV_HEADS * HEAD_DIM * int(self.keys.sum())


CASES = (
    *(Decode(f"B{B} S{S}", B, S) for B, S in ((1, 4096), (1, 32768), (64, 4096), (16, 32768))),
    *(Decode(f"B{B} S{S} mixed lengths", B, S, "mixed") for B, S in ((64, 4096), (16, 32768))),
    *(Decode(f"B64 S4096 mixed lengths, pages of {page}", 64, 4096, "mixed", page) for page in (16, 64, 128)),
    Decode("B64 S4096, 4 queries", 64, 4096, queries=4),
)


def operands(case: Decode) -> dict[str, Any]:
    """query (B, Hq, L, E), key and value (B, H, S, E); lengths (B,)."""
    B, S = case.batch, case.key_len
    q, k, v = jax.random.split(jax.random.key(0), 3)
    kv = (B, KV_HEADS, S, HEAD_DIM)
    given: dict[str, Any] = {
        "query": jax.random.normal(q, (B, Q_HEADS, case.queries, HEAD_DIM), jnp.bfloat16),
        "key": jax.random.normal(k, kv, jnp.bfloat16),
        "value": jax.random.normal(v, kv, jnp.bfloat16),
        "lengths": jnp.asarray(case.keys, jnp.int32),
    }
    return given


def narrowed(given: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The same with keys and values in 8 bits and a scale for each key of each head, (B, H, S), float32."""
    most = 127 if dtype == jnp.int8 else 448
    found = dict(given)
    for name in ("key", "value"):
        wide = given[name].astype(jnp.float32)
        scale = jnp.max(jnp.abs(wide), -1) / most
        narrow = wide / scale[..., None]
        found |= {name: (jnp.rint(narrow) if dtype == jnp.int8 else narrow).astype(dtype), name + "_scale": scale}
    return found


def on_pages(case: Decode, given: dict[str, Any]) -> dict[str, Any]:
    """What the call takes: keys, values and scales on pages in a random order, where the case says so."""
    if case.page is None:
        return given
    order = np.random.default_rng(0).permutation(case.batch * case.key_len // case.page)

    def paged(x: Any) -> Any:
        return jnp.swapaxes(x, 1, 2).reshape(-1, case.page, KV_HEADS, *x.shape[3:])[order]

    found = {name: paged(x) if name not in ("query", "lengths") else x for name, x in given.items()}
    found |= {name: jnp.swapaxes(x, 1, 2) for name, x in found.items() if name == "query" or name.endswith("_scale")}
    return found | {"pages": jnp.asarray(np.argsort(order).reshape(case.batch, -1), jnp.int32)}


def ours(case: Decode, config: DecodeConfig | None) -> Callable[[dict[str, Any]], Any]:
    """The call as a function of `on_pages`'s arrays."""

    def run(given: dict[str, Any]) -> Any:
        more = {name: given[name] for name in ("pages", "key_scale", "value_scale") if name in given}
        mask = KeyLengths(given["lengths"]) if case.lengths != "full" else None
        out, _ = flash_decode.decode(
            given["query"], given["key"], given["value"], layout="BHLE" if case.page is None else "BLHE", scale=HEAD_DIM**-0.5,
            mask=mask, config=config, **more,
        )  # fmt: skip
        return out

    return run


def _file(case: Decode, name: str) -> str:
    return re.sub(r"[^\w]+", "-", f"{case.name} {name}") + ".bin"


def export_all(cases: list[Decode], several: bool, directory: pathlib.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for name, (narrow, config) in variants(case, several).items():
            given = jax.eval_shape(lambda case=case, narrow=narrow: on_pages(case, kept(operands(case), narrow)))
            exported = export.export(jax.jit(ours(case, config)), platforms=["cuda"])(given)
            (directory / _file(case, name)).write_bytes(exported.serialize())
            print(case.name, name, flush=True)


def kept(given: dict[str, Any], narrow: Any) -> dict[str, Any]:
    return given if narrow is None else narrowed(given, narrow)


def peers(case: Decode, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.lengths != "full":
        return {}
    q, k, v = (torch.from_dlpack(given[name]) for name in ("query", "key", "value"))
    found: dict[str, Callable[[], Any]] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def call(backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        found["torch " + backend.name.removesuffix("_ATTENTION")] = call
    return found


@jax.jit
def exact(given: dict[str, Any]) -> jax.Array:
    """float32 of the first and the last sequence, (2, Hq, L, E), by the definition."""
    ends = jnp.array([0, -1])
    q, k, v = (given[name][ends].astype(jnp.float32) for name in ("query", "key", "value"))
    if "key_scale" in given:
        k, v = (x * given[name][ends][..., None] for x, name in ((k, "key_scale"), (v, "value_scale")))
    k, v = (jnp.repeat(x, Q_HEADS // KV_HEADS, 1) for x in (k, v))
    s = jnp.einsum("bhle,bhse->bhls", q, k, precision="highest") * HEAD_DIM**-0.5
    s = jnp.where(jnp.arange(k.shape[2]) < given["lengths"][ends][:, None, None, None], s, -jnp.inf)
    return jnp.einsum("bhls,bhse->bhle", jax.nn.softmax(s), v, precision="highest")


def variants(case: Decode, several: bool) -> dict[str, tuple[Any, DecodeConfig | None]]:
    """(8-bit dtype or None, configuration) by name; None is the tuned one."""
    found: dict[str, tuple[Any, DecodeConfig | None]] = {"ours": (None, None)}
    found |= {f"ours, {dtype.__name__}": (dtype, None) for dtype in EIGHT_BITS}
    if not several:
        return found
    sizes = {"rows": Q_HEADS // KV_HEADS * case.queries, "head_dim": HEAD_DIM, "value_head_dim": HEAD_DIM}
    base = decode_config(**sizes)
    for block_k, stages, queries, programs in (
        (64, 2, 2, 132), (64, 4, 2, 132), (64, 5, 2, 132), (64, 6, 1, 132), (128, 2, 2, 132), (128, 2, 1, 132), (64, 3, 2, 128),
    ):  # fmt: skip
        config = dataclasses.replace(base, block_k=block_k, stages=stages, queries=queries, programs=programs)
        found[f"{block_k} keys, {stages} stages, {queries} of queries, {programs} programs"] = None, config
    base = eight_bit_config(**sizes)
    assert base is not None
    for stages, programs in ((2, 264), (3, 264), (5, 264), (6, 264), (10, 132)):
        config = dataclasses.replace(base, stages=stages, programs=programs)
        found |= {f"{dtype.__name__}, {stages} stages, {programs} programs": (dtype, config) for dtype in EIGHT_BITS}
    return found


def measure(case: Decode, rounds: int, several: bool, programs: pathlib.Path | None) -> dict[str, Any]:
    given = operands(case)
    takes = {dtype: on_pages(case, kept(given, dtype)) for dtype in (None, *EIGHT_BITS)}
    wanted = {dtype: exact(kept(given, dtype)) for dtype in (None, *EIGHT_BITS)}
    calls: dict[str, Callable[[], Any]] = {}
    own_bytes: dict[str, float] = {}
    for name, (narrow, config) in variants(case, several).items():
        if programs is None:
            program = ours(case, config)
        else:
            program = export.deserialize(bytearray((programs / _file(case, name)).read_bytes())).call
        compiled = jax.jit(program).lower(takes[narrow]).compile()
        calls[name] = functools.partial(compiled, takes[narrow])
        own_bytes[name] = case.bytes if narrow is None else case.bytes / 2 * (1 + 4 / HEAD_DIM)  # and the scales
        got = calls[name]()[jnp.array([0, -1])]
        got = jnp.swapaxes(got, 1, 2) if case.page is not None else got
        error = float(jnp.linalg.norm(got.astype(jnp.float32) - wanted[narrow]) / jnp.linalg.norm(wanted[narrow]))
        if not error < 6e-3:
            raise SystemExit(f"{case.name}, {name}: error {error}; nothing is timed that is not right.")
    calls |= peers(case, given)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(device_time(call))
    seconds = {name: statistics.median(own) for name, own in times.items()}
    print(case.name, flush=True)
    for name, own in seconds.items():
        rate = own_bytes.get(name, case.bytes) / own / 1e12
        print(f"    {name:72s}{1e6 * own:9.1f} us{rate:7.2f} TB/s{seconds['ours'] / own:7.2f} of ours", flush=True)
    return {
        "case": case.name, "bytes": {name: own_bytes.get(name, case.bytes) for name in seconds},
        "microseconds": {name: 1e6 * own for name, own in seconds.items()},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument(
        "--export", type=pathlib.Path, default=None, help="no GPU needed: only lower the programs, into this directory"
    )
    parser.add_argument("--programs", type=pathlib.Path, default=None, help="compile what was exported there")
    parser.add_argument("--save", default=None, help=saved.HELP)
    args = parser.parse_args(argv)
    cases = [case for case in CASES if args.only in case.name]
    if args.export is not None:
        export_all(cases, args.variants, args.export)
        return 0

    import torch

    machine = saved.machine(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    print(machine, flush=True)
    rows = []
    for case in cases:
        rows.append(measure(case, args.rounds, args.variants, args.programs))
        if args.save:
            saved.save(args.save, machine, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
