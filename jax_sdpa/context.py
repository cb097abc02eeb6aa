"""What the surrounding program allows: which backends, in which order, for which device. Part of `jit`'s key.

The values live in JAX user contexts, so that one jitted function called inside and outside of a context is traced for each;
a plain context variable would be ignored after the first trace. They are per thread, with one global default.
"""

from __future__ import annotations

import dataclasses
import enum

import jax


class SDPBackend(enum.IntEnum):
    """The backends of scaled dot product attention; the numbers are torch's (`torch.nn.attention.SDPBackend`)."""

    ERROR = -1
    MATH = 0
    FLASH_ATTENTION = 1
    EFFICIENT_ATTENTION = 2
    CUDNN_ATTENTION = 3
    OVERRIDEABLE = 4


BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)  # those that exist here, in the default order


@dataclasses.dataclass(frozen=True)
class Toggles:
    """torch.backends.cuda's flags: a backend that is off is not considered, unless `sdpa_kernel` names it."""

    flash: bool = True
    mem_efficient: bool = True
    math: bool = True
    cudnn: bool = True
    low_precision_math: bool = False

    def allowed(self) -> tuple[SDPBackend, ...]:
        on = {
            SDPBackend.FLASH_ATTENTION: self.flash,
            SDPBackend.CUDNN_ATTENTION: self.cudnn,
            SDPBackend.EFFICIENT_ATTENTION: self.mem_efficient,
            SDPBackend.MATH: self.math,
        }
        return tuple(backend for backend in BACKENDS if on[backend])


@dataclasses.dataclass(frozen=True)
class Allowed:
    """The backends that a call may use; `ordered` = take the first that can, instead of the platform's own preference."""

    backends: tuple[SDPBackend, ...]
    ordered: bool = False


TOGGLES = jax.make_user_context(default_value=Toggles())
KERNEL = jax.make_user_context(default_value=None)  # an Allowed inside `sdpa_kernel`
DEVICE = jax.make_user_context(default_value=None)  # a device's name, as in `assume_device("cuda:sm90")`


def allowed_now() -> Allowed:
    """What holds at this point of the program: the innermost `sdpa_kernel` of this thread, else the toggles."""
    return KERNEL.value if KERNEL.value is not None else Allowed(TOGGLES.value.allowed())
