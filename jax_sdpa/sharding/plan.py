"""Which way of context parallelism a call takes, and why: a pure function of its shapes, its masks' kinds and the mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jax_sdpa import dispatch
from jax_sdpa.device import Device
from jax_sdpa.masks.packed import KeyRanges
from jax_sdpa.request import SdpaRequest
from jax_sdpa.sharding.layout import MeshAxes
from jax_sdpa.sharding.zigzag import Order

METHODS = ("decode", "all_to_all", "ring")  # in the order in which they are considered


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is spread over a mesh axis; `print` it.

    Fields: method, 'ring', 'all_to_all' or 'decode'; why, a sentence; rejected, {method: sentences} of the others; devices, of the
    axis; choice, which backend runs what one device calls (`dispatch.Choice`), and why no other.
    """

    method: str
    why: str
    rejected: dict[str, list[str]]
    devices: int
    choice: dispatch.Choice

    def __str__(self) -> str:
        lines = [f"{self.method} over {self.devices} devices: {self.why}"]
        for method, reasons in self.rejected.items():
            lines += [f"  {method} not used because:", *(f"    {reason}" for reason in reasons)]
        return "\n".join([*lines, "Each device's calls:", *(f"  {line}" for line in str(self.choice).splitlines())])


def _multiple(name: str, length: int, of: int, method: str) -> list[str]:
    if length % of == 0:
        return []
    return [f"{method} needs {name} to be a multiple of {of}, got {length}: pad it, and mask what was added by KeyLengths."]


def reasons_against(method: str, request: SdpaRequest, axes: MeshAxes, order: Order) -> list[str]:
    """Every reason, in plain sentences, why a method can't run a call."""
    n, parts = axes.devices, axes.size(axes.heads)
    L, S = request.query_len, request.key_len
    Hq, H = request.q_heads // parts, max(1, request.kv_heads // parts)
    if method == "ring":
        reasons = [*_multiple("L", L, order.total, "The ring"), *_multiple("S", S, order.total, "The ring")]
        if order.name != "contiguous" and any(isinstance(mask, KeyRanges) for mask in request.masks):
            reasons.append(
                "The ring in zig-zag takes no packed sequences, whose ranges ascend along the queries; give segment ids."
            )
        return reasons
    reasons = []
    if order.name != "contiguous":
        reasons.append(f"{method} needs the sequence in order, not in zig-zag: it needs no balance.")
    if method == "all_to_all":
        reasons += [*_multiple("L", L, n, "all_to_all"), *_multiple("S", S, n, "all_to_all")]
        if Hq % n:
            reasons.append(f"all_to_all needs a multiple of {n} query heads, a device has {Hq}.")
        if H % n and n % H:
            reasons.append(f"all_to_all needs key/value heads that are a multiple or a divisor of {n}, a device has {H}.")
        return reasons
    return reasons + _multiple("S", S, n, "decode")


def _prefers_not(method: str, request: SdpaRequest, axes: MeshAxes) -> list[str]:
    """Why a method that could run a call is not the one to take."""
    if method == "decode":
        L, S = request.query_len, request.key_len
        summed = 4 * request.q_heads * L * (request.value_head_dim + 2)
        travels = request.key.dtype.itemsize * request.kv_heads * S * (request.head_dim + request.value_head_dim)
        if 2 * summed >= travels or L == S:
            return [f"decode makes sense for few queries: its sums over L={L} are no less than what S={S} keys are."]
    if method == "all_to_all":
        for name in ("bias", "keep_mask"):
            array = getattr(request, name)
            if array is not None and array.shape[1] == 1 and array.shape[2] != 1:
                return ["all_to_all would have all rows of the dense mask on every device, the ring has its own ones."]
    return []


WHY = {
    "ring": "keys and values go round, and what a mask leaves empty is skipped.",
    "all_to_all": "heads divide evenly, so each device has whole sequences of some heads.",
    "decode": "the queries are few, so the keys stay where they are and results are merged.",
}


def choose(request: SdpaRequest, axes: MeshAxes, order: Order, method: str | None, device: Device) -> Plan:
    """The plan of a call, by the method asked for or the first that suits.

    Raises ValueError if the one asked for, or every one, has reasons against the call.
    """
    against = {name: reasons_against(name, request, axes, order) for name in METHODS}
    if method is not None:
        if against[method]:
            raise ValueError(f"method={method!r} cannot run this call: {' '.join(against[method])}")
        chosen, why = method, "it was asked for."
    else:
        against = {name: reasons or _prefers_not(name, request, axes) for name, reasons in against.items()}
        able = [name for name in METHODS if not against[name]]
        if not able:
            sentences = " ".join(f"{name}: {' '.join(reasons)}" for name, reasons in against.items())
            raise ValueError(f"No way of context parallelism can run this call. {sentences}")
        chosen, why = able[0], WHY[able[0]]
    rejected = {
        name: reasons or [f"It could run the call; {chosen} is taken here."] for name, reasons in against.items() if name != chosen
    }
    return Plan(chosen, why, rejected, axes.devices, dispatch.choose(part_of(chosen, request, axes, order), device))


def part_of(method: str, request: SdpaRequest, axes: MeshAxes, order: Order) -> SdpaRequest:
    """The call that one device makes, as shapes."""
    along, n, parts = request.length_axis, axes.devices, axes.size(axes.heads)
    queries = {"ring": order.total, "all_to_all": 1, "decode": 1}[method]
    keys = {"ring": order.total, "all_to_all": 1, "decode": n}[method]
    heads = parts * (n if method == "all_to_all" else 1)

    def cut(x: Any, *divisors: int) -> Any:
        if x is None:
            return None
        shape = tuple(size if size == 1 else max(1, size // by) for size, by in zip(x.shape, divisors, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def laid_out(x: Any, length: int) -> Any:
        return cut(x, axes.size(axes.batch), *((heads, length) if along == 2 else (length, heads)), 1)

    batch = axes.size(axes.batch)
    found = dataclasses.replace(
        request,
        query=laid_out(request.query, queries),
        key=laid_out(request.key, keys),
        value=laid_out(request.value, keys),
        bias=cut(request.bias, batch, heads, queries, keys),
        keep_mask=cut(request.keep_mask, batch, heads, queries, keys),
        masks=tuple(
            mask.local(lambda x: cut(x, batch), lambda x: cut(x, batch, queries), lambda x: cut(x, batch, keys))
            for mask in request.masks
        ),
        scale=cut(request.scale, batch),
        sinks=cut(request.sinks, batch, heads) if method == "all_to_all" else None,
        dropout_seeds=cut(request.dropout_seeds, batch, heads, 1),
    )
    return found.with_spec(part=method == "ring")
