"""`python -m benchmarks.gpu_decode`: decode on a GPU beside torch's backends; device time, bytes of the cache per second; JSON.

python -m benchmarks.gpu_decode [--only B64] [--rounds 3] [--variants] [--save NAME]

One query (28 heads on 4 of keys and values, head dim 128: Qwen2-7B's) to a cache of bfloat16. The floor is the cache, read once:
2 * B * 4 * S * 128 * 2 bytes over the chip's copy rate, 4.3 TB/s on an H200. Small caches stay in its L2 of 50 MB, ours and the
peers' alike. Correctness comes first: against torch's EFFICIENT in float32 where that can say the call, else against MATH here.
--variants: the kernels' configurations, beside the tuned one.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import saved
from benchmarks.gpu import device_time
from jax_sdpa.attention.bias import KeyLengths
from pallas_kernels import flash_decode
from pallas_kernels.contracts import DecodeConfig
from pallas_kernels.decode_tuning import decode_config

Q_HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128


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
    """query (B, Hq, L, E), key and value (B, H, S, E); lengths (B,); pages of them where the case says so."""
    B, S = case.batch, case.key_len
    q, k, v = jax.random.split(jax.random.key(0), 3)
    kv = (B, KV_HEADS, S, HEAD_DIM)
    given: dict[str, Any] = {
        "query": jax.random.normal(q, (B, Q_HEADS, case.queries, HEAD_DIM), jnp.bfloat16),
        "key": jax.random.normal(k, kv, jnp.bfloat16),
        "value": jax.random.normal(v, kv, jnp.bfloat16),
        "lengths": jnp.asarray(case.keys, jnp.int32),
    }
    if case.page is not None:
        order = np.random.default_rng(0).permutation(B * S // case.page)
        paged = lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, case.page, KV_HEADS, HEAD_DIM)[order]  # noqa: E731
        given |= {"key_pages": paged(given["key"]), "value_pages": paged(given["value"])}
        given["pages"] = jnp.asarray(np.argsort(order).reshape(B, -1), jnp.int32)
    return given


def ours(case: Decode, config: DecodeConfig | None, given: dict[str, Any]) -> Callable[[], Any]:
    mask = KeyLengths(given["lengths"]) if case.lengths != "full" else None
    names = ("query", "key", "value") if case.page is None else ("query", "key_pages", "value_pages")
    arrays = [given[name] for name in names]
    layout = "BHLE" if case.page is None else "BLHE"
    if case.page is not None:
        arrays[0] = jnp.swapaxes(arrays[0], 1, 2)

    @jax.jit
    def run(q: Any, k: Any, v: Any, mask: Any, pages: Any) -> Any:
        out, _ = flash_decode.decode(q, k, v, layout=layout, scale=HEAD_DIM**-0.5, mask=mask, pages=pages, config=config)
        return out

    program = run.lower(*arrays, mask, given.get("pages")).compile()
    return lambda: program(*arrays, mask, given.get("pages"))


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
    k, v = (jnp.repeat(x, Q_HEADS // KV_HEADS, 1) for x in (k, v))
    s = jnp.einsum("bhle,bhse->bhls", q, k, precision="highest") * HEAD_DIM**-0.5
    s = jnp.where(jnp.arange(k.shape[2]) < given["lengths"][ends][:, None, None, None], s, -jnp.inf)
    return jnp.einsum("bhls,bhse->bhle", jax.nn.softmax(s), v, precision="highest")


def variants(case: Decode) -> dict[str, DecodeConfig | None]:
    """By name; None is the tuned one."""
    found: dict[str, DecodeConfig | None] = {"ours": None}
    base = decode_config(rows=Q_HEADS // KV_HEADS * case.queries, head_dim=HEAD_DIM, value_head_dim=HEAD_DIM)
    for block_k, stages, queries, programs in (
        (64, 2, 2, 132), (64, 4, 2, 132), (64, 5, 2, 132), (64, 6, 1, 132), (128, 2, 2, 132), (128, 2, 1, 132), (64, 3, 2, 128),
    ):  # fmt: skip
        config = dataclasses.replace(base, block_k=block_k, stages=stages, queries=queries, programs=programs)
        found[f"{block_k} keys, {stages} stages, {queries} of queries, {programs} programs"] = config
    return found


def measure(case: Decode, rounds: int, several: bool) -> dict[str, Any]:
    given = operands(case)
    configs = variants(case) if several else {"ours": None}
    calls = {name: ours(case, config, given) for name, config in configs.items()}
    wanted = exact(given)
    for name, call in calls.items():
        got = call()[jnp.array([0, -1])]
        got = jnp.swapaxes(got, 1, 2) if case.page is not None else got
        error = float(jnp.linalg.norm(got.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))
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
        print(f"    {name:56s}{1e6 * own:9.1f} us{case.bytes / own / 1e12:7.2f} TB/s", flush=True)
    return {"case": case.name, "bytes": case.bytes, "microseconds": {name: 1e6 * own for name, own in seconds.items()}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--save", default=None, help=saved.HELP)
    args = parser.parse_args(argv)

    import torch

    machine = saved.machine(gpu=torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    print(machine, flush=True)
    rows = []
    for case in CASES:
        if args.only in case.name:
            rows.append(measure(case, args.rounds, args.variants))
            if args.save:
                saved.save(args.save, machine, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
