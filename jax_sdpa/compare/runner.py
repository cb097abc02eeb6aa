"""One case through torch and through every backend of ours: the exact answer, errors, gradients, times, memory, a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_sdpa.attention import SDPBackend, sdpa_kernel
from jax_sdpa.compare.cases import Case, Shape
from jax_sdpa.compare.devices import Device
from jax_sdpa.compare.frameworks import Explain, Jax, Oracle, Torch, jax_to_numpy, torch_to_numpy
from jax_sdpa.compare.inputs import Inputs
from jax_sdpa.compare.measure import Error, Judged, error_of, judge, median_ms

BACKENDS = ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
SHORT = {"MATH": "MATH", "EFFICIENT_ATTENTION": "EFFICIENT", "FLASH_ATTENTION": "FLASH", "CUDNN_ATTENTION": "CUDNN"}

HOLDS, FAILS, REFUSED = "holds", "fails", "refused"
GRADIENTS = {"query": "dq", "key": "dk", "value": "dv", "attn_mask": "dmask"}

Results = dict[str, np.ndarray]  # 'out', 'dq', … as float64
Tick = Callable[[str], None]  # called after each step with the name of the next one


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call takes, forward and forward + backward: median milliseconds, bytes of memory; None = not measured."""

    forward_ms: float | None = None
    both_ms: float | None = None
    forward_bytes: int | None = None
    both_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One backend of ours on one case.

    Fields: verdict; reasons, why it refuses, or what is at fault; tensors, 'out', 'dq', 'dk', 'dv', 'dmask' as far as they were
    computed; cost; no_gradient, why the backward alone is refused (empty: it is not).
    """

    backend: str
    verdict: str
    reasons: tuple[str, ...] = ()
    tensors: dict[str, Judged] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()
    no_gradient: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case: torch's own errors and cost beside a cell for each backend."""

    case: Case
    shape: Shape
    cells: tuple[Cell, ...]
    torch_errors: dict[str, Error] = dataclasses.field(default_factory=dict)
    torch_cost: Cost = Cost()
    torch_fault: str = ""

    @property
    def verdict(self) -> str:
        """A case fails if anything fails, is refused if every backend refuses, and holds else."""
        verdicts = {cell.verdict for cell in self.cells}
        if self.torch_fault or FAILS in verdicts:
            return FAILS
        return HOLDS if HOLDS in verdicts else REFUSED


def run_case(
    case: Case,
    inputs: Inputs,
    device: Device,
    *,
    size: str = "small",
    backends: Sequence[str] = BACKENDS,
    repeats: int = 5,
    gradients: bool = True,
    tick: Tick = lambda step: None,
) -> Outcome:
    """Compare one case; nothing is raised for what a framework does with it, that is part of the outcome."""
    asked = (case.only,) if case.only is not None else tuple(backends)
    shape = case.shape(size)
    if case.only is not None and case.only not in backends:
        return Outcome(case, shape, tuple(Cell(name, REFUSED, ("left out by --backends",)) for name in asked))
    try:
        tick("torch float64")
        exact = _torch_exact(case, inputs, device, gradients)
        tick("torch")
        torch_errors, torch_cost = _torch_own(case, inputs, device, exact, repeats, gradients)
    except Exception as error:  # whatever torch says to the call is the outcome
        return Outcome(case, shape, (), torch_fault=f"torch: {_words(error)}")
    cells = []
    for name in asked:
        tick(SHORT[name])
        cells.append(_cell(case, inputs, device, name, exact, torch_errors, repeats, gradients))
    return Outcome(case, shape, tuple(cells), torch_errors, torch_cost)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


# --- torch


def _torch_calls(
    case: Case, inputs: Inputs, face: Torch, *, exact: bool, gradients: bool
) -> tuple[Callable[[], Any], Callable[[], dict[str, Any]]]:
    """(a call that gives the output, a call that gives output and gradients as tensors by name)."""
    names = inputs.differentiable if gradients else ()
    tensors = face.tensors(inputs.arrays, differentiable=names, exact=exact)
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    douts: dict[str, Any] = {}

    def forward() -> Any:
        with face.torch.no_grad():
            return case.line(face, **plain)

    def both() -> dict[str, Any]:
        out = case.line(face, **tensors)
        if not names:
            return {"out": out}
        if not douts:
            douts.update(face.tensors({"dout": inputs.dout(tuple(out.shape))}, exact=exact))
        found = face.torch.autograd.grad(out, [tensors[name] for name in names], douts["dout"])
        return {"out": out, **{GRADIENTS[name]: gradient for name, gradient in zip(names, found, strict=True)}}

    return forward, both


def _torch_exact(case: Case, inputs: Inputs, device: Device, gradients: bool) -> Results:
    """The exact answer: the case's line on the same numbers in float64, by torch's MATH."""
    face = Oracle(device)
    _, both = _torch_calls(case, inputs, face, exact=True, gradients=gradients)
    with face.sdpa_kernel():
        return {name: torch_to_numpy(tensor) for name, tensor in both().items()}


def _torch_own(
    case: Case, inputs: Inputs, device: Device, exact: Results, repeats: int, gradients: bool
) -> tuple[dict[str, Error], Cost]:
    """torch as a user calls it, in the case's dtype and on the backend that torch itself chooses."""
    face = Torch(device)
    forward, both = _torch_calls(case, inputs, face, exact=False, gradients=gradients)
    found = {**both(), "out": forward()}
    errors = {name: error_of(torch_to_numpy(tensor), exact[name]) for name, tensor in found.items()}
    del found

    def waited(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            device.synchronise()

        return run

    cost = Cost(forward_ms=median_ms(waited(forward), repeats), forward_bytes=device.torch_peak(forward))
    if gradients:
        cost = dataclasses.replace(cost, both_ms=median_ms(waited(both), repeats), both_bytes=device.torch_peak(both))
    return errors, cost


# --- ours


@contextlib.contextmanager
def _jax_context(case: Case, device: Device, backend: str) -> Iterator[None]:
    """The device, the one backend (a line that names its own replaces it), and float64 where the case is float64."""
    with contextlib.ExitStack() as stack:
        if case.dtype == "float64":
            stack.enter_context(jax.enable_x64(True))
        stack.enter_context(device.jax_default())
        stack.enter_context(sdpa_kernel([SDPBackend[backend]]))
        yield


def _refusal(case: Case, arrays: dict[str, Any], backend: str, *, grad: bool) -> tuple[str, ...]:
    """Why the backend can't run the case's call; empty if it can. Asked, not tried."""
    choice = case.line(Explain(grad), **arrays)
    return () if choice.backend is not None else tuple(choice.rejected[SDPBackend[backend]])


def _cell(
    case: Case,
    inputs: Inputs,
    device: Device,
    backend: str,
    exact: Results,
    torch_errors: dict[str, Error],
    repeats: int,
    gradients: bool,
) -> Cell:
    try:
        with _jax_context(case, device, backend):
            return _run_backend(case, inputs, device, backend, exact, torch_errors, repeats, gradients)
    except Exception as error:  # a backend that raises fails its cell, and the other cells are still worth having
        return Cell(backend, FAILS, (_words(error),))


def _run_backend(
    case: Case,
    inputs: Inputs,
    device: Device,
    backend: str,
    exact: Results,
    torch_errors: dict[str, Error],
    repeats: int,
    gradients: bool,
) -> Cell:
    arrays = {name: jax.device_put(array, device.jax) for name, array in inputs.arrays.items()}
    if reasons := _refusal(case, arrays, backend, grad=False):
        return Cell(backend, REFUSED, reasons)
    face = Jax()
    varied = inputs.differentiable
    fixed = {name: array for name, array in arrays.items() if name not in varied}

    def forward(operands: dict[str, Any], fixed: dict[str, Any]) -> Any:
        return case.line(face, **operands, **fixed)

    def both(operands: dict[str, Any], fixed: dict[str, Any], dout: Any) -> tuple[Any, dict[str, Any]]:
        out, pullback = jax.vjp(lambda operands: forward(operands, fixed), operands)
        return out, pullback(dout)[0]

    operands = {name: arrays[name] for name in varied}
    run, forward_bytes = _compiled(forward, operands, fixed)
    out = run()
    found = {"out": jax_to_numpy(out)}
    cost = Cost(forward_ms=median_ms(run, repeats), forward_bytes=forward_bytes)

    no_gradient: tuple[str, ...] = ()
    if gradients and not (no_gradient := _refusal(case, arrays, backend, grad=True)):
        dout = jax.device_put(inputs.dout(out.shape), device.jax)
        run, both_bytes = _compiled(both, operands, fixed, dout)
        _, cotangents = run()
        found |= {GRADIENTS[name]: jax_to_numpy(cotangents[name]) for name in varied}
        cost = dataclasses.replace(cost, both_ms=median_ms(run, repeats), both_bytes=both_bytes)

    tensors = {name: judge(name, array, exact[name], torch_errors[name], case.dtype) for name, array in found.items()}
    faults = tuple(fault for judged in tensors.values() for fault in judged.faults)
    return Cell(backend, FAILS if faults else HOLDS, faults, tensors, cost, no_gradient)


def _compiled(function: Callable[..., Any], *operands: Any) -> tuple[Callable[[], Any], int | None]:
    """(a call of the compiled function that returns when its result is there, the bytes of temporaries that XLA plans for it)."""
    compiled = jax.jit(function).lower(*operands).compile()
    analysis = compiled.memory_analysis()
    run = functools.partial(compiled, *operands)
    return lambda: jax.block_until_ready(run()), None if analysis is None else int(analysis.temp_size_in_bytes)
