"""Which backend runs a request on a device: a pure function of shapes, dtypes, mask kinds, the device and what is allowed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable

from jax_sdpa.context import BACKENDS, SDPBackend
from jax_sdpa.device import Device
from jax_sdpa.errors import NoViableBackendError
from jax_sdpa.implementations import IMPLEMENTATIONS, faster_on_cpu
from jax_sdpa.implementations.base import Implementation
from jax_sdpa.request import SdpaRequest

HEADINGS = {backend: implementation.heading for backend, implementation in IMPLEMENTATIONS.items()}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and for each other one every reason why not.

    Fields: backend, None if no backend can; device, for which it was chosen; rejected, {backend: sentences}; notes, what else a
    user may want to know of the chosen one.
    """

    backend: SDPBackend | None
    device: Device
    rejected: dict[SDPBackend, list[str]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.device}: {self.backend.name if self.backend is not None else 'no viable backend'}"]
        lines += [f"  {note}" for note in self.notes]
        for backend, reasons in self.rejected.items():
            lines += [f"  {backend.name} not used because:", *(f"    {reason}" for reason in reasons)]
        return "\n".join(lines)


def preference(request: SdpaRequest, device: Device) -> tuple[SDPBackend, ...]:
    """The order in which backends are considered: the caller's where it set a priority, else the platform's."""
    allowed = request.spec.allowed
    if allowed.ordered:
        return allowed.backends
    order = list(BACKENDS)
    if device.platform != "cuda" and faster_on_cpu(request) is SDPBackend.MATH:
        order.sort(key=lambda backend: backend is SDPBackend.EFFICIENT_ATTENTION)  # MATH before EFFICIENT
    return tuple(backend for backend in order if backend in allowed.backends)


def _reasons(backend: SDPBackend, request: SdpaRequest, device: Device) -> list[str]:
    """Every reason of a backend against the request; what it promises of its bits is asked of all of them in one way."""
    implementation = IMPLEMENTATIONS[backend]
    reasons = implementation.reasons_against(request, device)
    return [*reasons, *implementation.against_batch_invariance(request)] if request.spec.batch_invariant else reasons


def _notes(implementation: Implementation, request: SdpaRequest, device: Device) -> tuple[str, ...]:
    """What `explain` adds about the chosen backend."""
    notes = [*implementation.notes(request, device)]
    if request.pages is not None and implementation.takes_pages(request):
        notes.append("Pages are read where they lie: nothing is gathered.")
    elif request.pages is not None:
        notes.append("Pages are gathered by XLA into each sequence's own keys first: a copy of max_pages * page keys a sequence.")
    if request.key_scale is not None:
        kind, copy = request.key.dtype, f"a copy of them in {request.query.dtype}"
        if implementation.takes_eight_bits(request):
            later = f", but for gradients, by {copy}" if request.spec.wrt else ": no copy is made"
            notes.append(f"Keys and values of {kind} are widened on their way{later}.")
        else:
            notes.append(f"Keys and values of {kind} are widened first: {copy}.")
    return tuple(notes)


def choose(request: SdpaRequest, device: Device) -> Choice:
    """The first backend of the preference that has no reason against the request, and everybody's reasons."""
    order = preference(request, device)
    chosen: SDPBackend | None = None
    rejected: dict[SDPBackend, list[str]] = {}
    for backend in order:
        reasons = _reasons(backend, request, device)
        if not reasons and chosen is None:
            chosen = backend
            continue
        rejected[backend] = reasons or [f"It could run the call; {chosen.name} is preferred here."]  # type: ignore[union-attr]
    for backend in BACKENDS:
        if backend not in order:
            reasons = _reasons(backend, request, device)
            rejected[backend] = ["It has been disabled by sdpa_kernel, a toggle or implementation=.", *reasons]
    notes = () if chosen is None else _notes(IMPLEMENTATIONS[chosen].for_device(device), request, device)
    return Choice(chosen, device, rejected, notes)


def implementation_for(request: SdpaRequest, device: Device) -> Implementation:
    """The backend that runs; warnings under torch's headings and NoViableBackendError if there is none."""
    choice = choose(request, device)
    if choice.backend is None:
        raise no_viable_backend(request, [choice])
    return IMPLEMENTATIONS[choice.backend].for_device(device)


def check_viable(request: SdpaRequest, devices: Iterable[Device]) -> None:
    """Raise while tracing if not one of the devices could run the request."""
    choices = []
    for device in devices:
        choices.append(choose(request, device))
        if choices[-1].backend is not None:
            return
    raise no_viable_backend(request, choices[:1])


def no_viable_backend(request: SdpaRequest, choices: list[Choice]) -> NoViableBackendError:
    """One UserWarning per enabled backend with its sentences, then the error with all of them."""
    enabled = request.spec.allowed.backends
    if not enabled:
        return NoViableBackendError(
            "No viable backend for scaled_dot_product_attention was found. This is likely due to turning off both the math kernel "
            "and the fused kernels: allow one with sdpa_kernel([...]) or torch's enable_*_sdp toggles."
        )
    for choice in choices:
        for backend in enabled:
            warnings.warn("\n".join([HEADINGS[backend], *choice.rejected[backend]]), UserWarning, stacklevel=2)
    return NoViableBackendError("No available kernel. Aborting execution.\n" + "\n".join(map(str, choices)))
