"""Which device a program is lowered for: the only file that asks."""

from __future__ import annotations

import dataclasses
import functools
import os
import re

import jax

from jax_sdpa import compat
from jax_sdpa.context import DEVICE

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


_DETERMINISM_FLAGS = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")


def deterministic_ops() -> bool:
    """Whether XLA_FLAGS asks for GPU programs that give the same bits each time they run; XLA reads it once, when it starts.

    The same as a `compiler_options` of one `jax.jit` is not visible while the program is lowered.
    """
    given = {}
    for flag in os.environ.get("XLA_FLAGS", "").split():
        name, _, value = flag.lstrip("-").partition("=")
        given[name] = value.lower() in ("", "true", "1")
    return any(given.get(name, False) for name in _DETERMINISM_FLAGS)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a backend may want to know of a device.

    Fields: platform, 'cpu', 'cuda', …; architecture, the CUDA compute capability as (major, minor), None where nobody knows
    (exported for 'cuda' without a GPU in sight); cudnn, its version as in 91600, None likewise; real, whether it is there;
    deterministic, whether XLA is asked to compile for it what gives the same bits each time.
    """

    platform: str
    architecture: tuple[int, int] | None = None
    cudnn: int | None = None
    real: bool = True
    deterministic: bool = dataclasses.field(default_factory=deterministic_ops)

    def __str__(self) -> str:
        return self.platform if self.architecture is None else f"{self.platform}:sm{self.architecture[0]}{self.architecture[1]}"


def parse(name: str) -> Device:
    """A device by name: 'cpu', 'cuda', 'cuda:sm90', 'cuda:sm90:cudnn91600', 'tpu', …, whether it is there or not.

    >>> parse("cuda:sm90").architecture
    (9, 0)
    """
    matched = re.fullmatch(r"(cpu|cuda|rocm|tpu)(?::sm(\d+)(\d))?(?::cudnn(\d+))?", name)
    if matched is None:
        raise ValueError(f"device must be a name such as 'cpu', 'cuda', 'cuda:sm90' or 'cuda:sm90:cudnn91600', got {name!r}.")
    platform, major, minor, cudnn = matched.groups()
    architecture = (int(major), int(minor)) if major else None
    return Device(platform, architecture, int(cudnn) if cudnn else compat.cudnn_version(), real=False)


def assume_device(name: str):
    """A context in which programs lowered for a platform that is not here are lowered for this very device.

    'cuda' alone names no architecture: an export on a machine without a GPU takes the backends that any GPU can run, unless it
    is traced in `with assume_device("cuda:sm90"):`. Part of `jit`'s key, as `sdpa_kernel` is.
    """
    parse(name)
    return DEVICE(name)


@functools.cache
def _visible(platform: str) -> Device:
    try:
        found = jax.local_devices(backend=platform)[0]
    except RuntimeError:  # JAX's answer for a platform without devices
        return Device(platform, real=False)
    capability = getattr(found, "compute_capability", None)
    architecture = tuple(int(part) for part in capability.split(".")) if capability else None
    cudnn = compat.cudnn_version() if platform == "cuda" else None
    return Device(platform, architecture, cudnn)  # type: ignore[arg-type]


def target(platform: str, assumed: str | None) -> Device:
    """The device that a program lowered for `platform` will meet: the assumed one, else the visible one, else an unknown one."""
    if assumed is not None and (device := parse(assumed)).platform == platform:
        return device
    return _visible(platform) if platform in PLATFORMS else Device(platform)


def default() -> Device:
    """The device that an eager call uses now: `jax.default_device`, else the default backend's."""
    chosen = compat.default_device()
    platform = chosen if isinstance(chosen, str) else getattr(chosen, "platform", None) or jax.default_backend()
    return target("cuda" if platform == "gpu" else platform, DEVICE.value)


def imaginable() -> tuple[Device, ...]:
    """The devices for which a program may be lowered after it is traced, the likeliest first."""
    return default(), Device("cpu"), target("cuda", DEVICE.value), parse("cuda:sm90:cudnn99900"), Device("tpu")
