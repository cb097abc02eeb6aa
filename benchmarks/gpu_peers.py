"""What `gpu` times ours beside: torch's backends, jax.nn's cuDNN, and, where they are installed, tokamax and FA4; the exact answer.

Each peer gets arrays in its own layout, made before anything is timed. One that cannot say a case is absent from it; one that
should and raises is left out, with its sentence printed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case

Calls = dict[str, Callable[[], Any]]

PACKAGES = {"tokamax": "tokamax", "FA4": "flash-attn-4"}
"""Peers that are used where they are installed, and the names that they are installed by."""

BLHE = ("jax.nn cuDNN", *PACKAGES)
"""Peers whose arrays are (B, L, H, E), what they return too; the others' are (B, H, L, E)."""


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name, package in PACKAGES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(package)
    return found


def peers(case: Case, arrays: list[jax.Array], more: Any, jax_nn: bool, dout: jax.Array | None = None) -> Calls:
    """Those that can say the same, by name; jax.nn's cuDNN if asked for. With a cotangent: (out, dq, dk, dv), else out."""
    found = torch_backends(case, arrays, more, dout)
    native = [jnp.swapaxes(x, 1, 2) for x in (*arrays, dout) if x is not None]
    if jax_nn and dout is None and more is None and not case.extra:
        run = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=case.causal, implementation="cudnn"))
        found["jax.nn cuDNN"] = functools.partial(run, *native)
    for name in versions():
        call = _that_runs(case, name, functools.partial({"tokamax": _tokamax, "FA4": _fa4}[name], case, native, more))
        if call is not None:
            found[name] = call
    return found


def torch_backends(case: Case, arrays: list[jax.Array], more: Any, dout: jax.Array | None = None) -> Calls:
    """EFFICIENT where no other can."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.from_dlpack(x).requires_grad_(dout is not None) for x in arrays)
    cotangent = None if dout is None else torch.from_dlpack(dout)
    mask = None
    if isinstance(more, jax.Array):
        mask = torch.from_dlpack(more)
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    elif case.extra == "lengths":
        mask = (torch.arange(case.query_len, device="cuda") < case.query_len - case.query_len // 8)[None, None, None, :].expand(
            case.batch, 1, 1, case.query_len
        )
    elif case.extra in ("segments", "window", "packed"):
        return {}
    options = {"attn_mask": mask, "is_causal": case.causal, "enable_gqa": case.kv_heads != case.q_heads}
    options["dropout_p"] = 0.1 if case.extra == "dropout" else 0.0
    found: Calls = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def call(backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

        if backend is SDPBackend.EFFICIENT_ATTENTION and found:
            continue
        try:
            call()
        except RuntimeError:  # torch's answer where the backend cannot
            continue
        if dout is not None:
            call = functools.partial(_with_gradients, call, (q, k, v), cotangent)
        found["torch " + backend.name.removesuffix("_ATTENTION")] = call
    return found


def _tokamax(case: Case, native: list[jax.Array], more: Any) -> Callable[[], Any] | None:
    """Its Mosaic GPU kernels, as configured by default; the gradient of a bias is not asked for, but the kernel writes it."""
    import tokamax

    if case.extra in ("dropout", "segments", "packed"):
        return None
    options: dict[str, Any] = {}
    if case.extra == "lengths":
        options["key_value_seq_lengths"] = more.lengths
    elif more is not None:
        options["mask" if more.dtype == bool else "bias"] = more
    attend = functools.partial(
        tokamax.dot_product_attention, is_causal=case.causal, implementation="mosaic",
        local_window_size=(1023, 0) if case.extra == "window" else None,
    )  # fmt: skip

    @jax.jit
    def run(options: dict[str, Any], q: Any, k: Any, v: Any, *dout: Any) -> Any:
        if not dout:
            return attend(q, k, v, **options)
        out, pullback = jax.vjp(functools.partial(attend, **options), q, k, v)
        return out, *pullback(*dout)

    return functools.partial(run, options, *native)


def _fa4(case: Case, native: list[jax.Array], more: Any) -> Callable[[], Any] | None:
    """FlashAttention-4's kernels in CuTe's DSL; its own names for a window are keys to the left and to the right."""
    import torch
    from flash_attn.cute import flash_attn_func

    if more is not None or case.extra not in ("", "window"):
        return None
    window = case.extra == "window"
    q, k, v, *dout = (torch.from_dlpack(x) for x in native)
    operands = tuple(x.requires_grad_(bool(dout)) for x in (q, k, v))

    def call() -> Any:
        out, _ = flash_attn_func(*operands, causal=case.causal or window, window_size=(1023, 0) if window else (None, None))
        return out

    return functools.partial(_with_gradients, call, operands, *dout) if dout else call


def _that_runs(case: Case, name: str, make: Callable[[], Callable[[], Any] | None]) -> Callable[[], Any] | None:
    """What `make` makes, if it runs; else the package says why not, by exceptions of its own. None where nobody asked it."""
    try:
        call = make()
        if call is not None:
            jax.block_until_ready(call())
        return call
    except Exception as refusal:
        print(f"{case.name}: {name} is left out: {type(refusal).__name__}: {' '.join(str(refusal).split())[:300]}", flush=True)
        return None


def _with_gradients(call: Callable[[], Any], operands: tuple[Any, ...], dout: Any) -> tuple[Any, ...]:
    """(out, dq, dk, dv), by torch."""
    import torch

    out = call()
    return out, *torch.autograd.grad(out, operands, dout)


def exact(case: Case, arrays: list[jax.Array], more: Any, dout: jax.Array | None = None) -> Any:
    """torch's EFFICIENT in float32, one batch entry, [out], with a cotangent [out, dq, dk, dv]; None where it cannot say it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.extra in ("segments", "window", "dropout", "packed"):
        return None
    leaves = tuple(torch.from_dlpack(x)[:1].float().requires_grad_(dout is not None) for x in arrays)
    q, k, v = leaves
    k, v = (x.repeat_interleave(case.q_heads // case.kv_heads, 1) for x in (k, v))
    mask = None
    if case.extra == "lengths":
        mask = (torch.arange(case.key_len, device="cuda") < int(more.lengths[0]))[None, None, None]
    elif more is not None:
        mask = torch.from_dlpack(more)[:1]
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.float()).expand(1, case.q_heads, case.query_len, case.key_len)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=case.causal)  # noqa: E731
        return [call()] if dout is None else _with_gradients(call, leaves, torch.from_dlpack(dout)[:1].float())


def error(name: str, results: Any, references: Any) -> float:
    """The largest of a call's errors."""
    import torch

    results = results if isinstance(results, (tuple, list)) else [results]
    results = [x if isinstance(x, torch.Tensor) else torch.from_dlpack(x) for x in results]
    results = [x.transpose(1, 2) for x in results] if name in BLHE else results
    return max(float((x[:1].float() - wanted).norm() / wanted.norm()) for x, wanted in zip(results, references, strict=True))
