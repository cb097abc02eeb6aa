"""The same call through us and through the peers: functions without arguments that run it and wait for the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from jax_sdpa import scaled_dot_product_attention
from jax_sdpa.attention import SDPBackend, sdpa_kernel

Call = Callable[[], Any]


def ours(case: Case, dtype: str, mode: str, backend: SDPBackend | None = None) -> tuple[Call, Any]:
    """(the call, its compiled program) of jax_sdpa; `backend` None = its own choice."""
    q, k, v, ct = (jnp.asarray(x, dtype) for x in case.inputs())

    def forward(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True)

    def both(q: Any, k: Any, v: Any, ct: Any) -> Any:
        out, pullback = jax.vjp(forward, q, k, v)
        return out, pullback(ct)

    operands = (q, k, v) if mode == "forward" else (q, k, v, ct)
    function = jax.jit(forward if mode == "forward" else both)
    if backend is None:
        program = function.lower(*operands).compile()
    else:
        with sdpa_kernel(backend):
            program = function.lower(*operands).compile()
    return lambda: jax.block_until_ready(program(*operands)), program


def torch_sdpa(case: Case, dtype: str, mode: str) -> Call:
    """torch.nn.functional.scaled_dot_product_attention, its own choice of backend."""
    import torch

    q, k, v, ct = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in case.inputs())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if mode == "forward":

        def call() -> Any:
            with torch.no_grad():
                return sdpa(q, k, v, is_causal=case.causal, enable_gqa=case.q_heads != case.kv_heads)

        return call
    for x in (q, k, v):
        x.requires_grad_()
    gqa = case.q_heads != case.kv_heads
    return lambda: torch.autograd.grad(sdpa(q, k, v, is_causal=case.causal, enable_gqa=gqa), (q, k, v), ct)


def error(case: Case, dtype: str) -> float:
    """The largest error of our output against float64, over that of torch in the same dtype: correctness comes first."""
    import torch

    q, k, v, _ = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in case.inputs())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    gqa = case.q_heads != case.kv_heads
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = sdpa(q.double(), k.double(), v.double(), is_causal=case.causal, enable_gqa=gqa).numpy()
        theirs = np.abs(sdpa(q, k, v, is_causal=case.causal, enable_gqa=gqa).double().numpy() - exact).max()
    call, _ = ours(case, dtype, "forward")
    return float(np.abs(np.asarray(call(), np.float64) - exact).max() / theirs)
