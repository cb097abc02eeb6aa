"""Where the two frameworks run: the CPU, or both on the same GPU. The only file of the comparison that asks."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jax_sdpa.compare.extras import need

NAMES = ("cpu", "cuda")

HIGH_WATER = Path("/proc/self/clear_refs")
"""Linux: writing 5 here sets the process's peak resident size (VmHWM) back to the present one. Source: proc_pid_clear_refs(5)."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as both frameworks name it: `jax` a `jax.Device`, `torch` a `torch.device`."""

    name: str
    jax: Any
    torch: Any

    def describe(self) -> str:
        """What a report calls this device."""
        if self.name == "cuda":
            return need("torch").cuda.get_device_name(self.torch)
        return f"{_cpu_model()}, {os.cpu_count()} cores"

    @contextlib.contextmanager
    def jax_default(self) -> Iterator[None]:
        """JAX runs here what is not committed elsewhere, and the choice of a backend is made for here."""
        with jax.default_device(self.jax):
            yield

    def synchronise(self) -> None:
        """Wait for what torch has been given to do; JAX's results have `block_until_ready`."""
        if self.name == "cuda":
            need("torch").cuda.synchronize(self.torch)

    def torch_peak(self, call: Any) -> int | None:
        """The bytes that torch allocates at most while `call` runs; None where there is no way to tell.

        CUDA: its allocator's own counter. CPU: how far the process's resident size rises, on Linux with glibc.
        """
        if self.name == "cuda":
            cuda = need("torch").cuda
            cuda.synchronize(self.torch)
            before = cuda.memory_allocated(self.torch)
            cuda.reset_peak_memory_stats(self.torch)
            call()
            cuda.synchronize(self.torch)
            return int(cuda.max_memory_allocated(self.torch) - before)
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used again, unseen
            HIGH_WATER.write_text("5")
            before = _resident("VmHWM")
        except (OSError, AttributeError):  # not Linux, not glibc
            return None
        call()
        return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A size in bytes from this process's status; OSError where the system does not tell."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def open_device(name: str | None) -> Device:
    """The device by name; None: the GPU if both frameworks see one, else the CPU.

    ValueError where one of the two frameworks has no such device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU's memory, torch needs its part
    torch = need("torch")
    if name not in (None, *NAMES):
        raise ValueError(f"device must be one of {', '.join(NAMES)}, got {name!r}.")
    missing = [] if torch.cuda.is_available() else [f"torch {torch.__version__} sees no GPU"]
    try:
        gpus = jax.devices("cuda") if name != "cpu" else []
    except RuntimeError:  # JAX's answer for a platform without devices
        gpus = []
        missing.append(f"jax {jax.__version__} sees no GPU")
    if name == "cuda" and missing:
        raise ValueError(f"device 'cuda' needs both frameworks on one: {' and '.join(missing)}.")
    if name == "cpu" or missing:
        return Device("cpu", jax.devices("cpu")[0], torch.device("cpu"))
    return Device("cuda", gpus[0], torch.device("cuda", 0))


def versions() -> dict[str, str]:
    """The versions that a report is about."""
    found = {"python": platform.python_version()}
    for library in ("jax-sdpa", "jax", "jaxlib", "torch", "numpy"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def threads() -> int:
    """How many threads torch uses for one call (its default; XLA takes every core)."""
    return need("torch").get_num_threads()
