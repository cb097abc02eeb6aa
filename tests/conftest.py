"""Devices and strictness: 8 virtual CPU devices, torch and flax required unless this leg says it goes without, GPU tests only with a GPU."""

import glob
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Much of the suite's time is LLVM's, optimizing small programs that run once: without, 104 s of some tests become 72. With
    # JAX_SDPA_OPTIMIZED=1 they run as users' programs are compiled: CI's slow tests do, and its doctests and its comparison anyway.
    if os.environ.get("JAX_SDPA_OPTIMIZED") != "1":
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import jax
import pytest
from harness import forget_programs_when_many

from jax_sdpa.attention import SDPBackend

FLAX = [
    *("test_attention_layer.py", "test_eight_bit_cache.py", "test_flax_layers.py", "test_gpt.py"),
    *("test_minilm.py", "test_qwen2.py", "test_vit.py"),
]
collect_ignore = FLAX if os.environ.get("JAX_SDPA_WITHOUT_FLAX") == "1" else []  # elsewhere a missing flax fails them

XLA_BACKENDS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION)


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("JAX_SDPA_WITHOUT_TORCH") == "1":  # elsewhere a missing torch fails the test that needs it
        without = [item for item in items if item.get_closest_marker("torch")]
        items[:] = [item for item in items if not item.get_closest_marker("torch")]
        config.hook.pytest_deselected(items=without)
    if not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU is visible"))


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is not None:
        forget_programs_when_many()


@pytest.fixture(params=XLA_BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> SDPBackend:
    """Every backend that runs everywhere: each test that takes it must hold for all of them."""
    return request.param


@pytest.fixture(
    params=[SDPBackend.EFFICIENT_ATTENTION, pytest.param(SDPBackend.MATH, marks=pytest.mark.slow)], ids=lambda b: b.name
)
def backend_of_layers(request: pytest.FixtureRequest) -> SDPBackend:
    """The same for whole layers and models, whose every backend is tested elsewhere: MATH among the slow tests."""
    return request.param


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest):
    """Both settings of `jax_enable_x64`; the value says which."""
    with jax.enable_x64(request.param):
        yield request.param
