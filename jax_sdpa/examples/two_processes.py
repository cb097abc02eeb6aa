"""One attention over two processes, as over two machines: `jax.distributed`, ring attention, and the numbers of one process.

    python -m jax_sdpa.examples.two_processes                        starts two processes on this machine's CPU and compares
    python -m jax_sdpa.examples.two_processes --process 0 --of 2 --coordinator HOST:PORT     one of them, wherever it runs

Each process has two CPU devices and makes only its own half of the sequence; K and V go round over the network (Gloo on CPUs, NCCL
on GPUs, both through XLA's collectives). What it prints, the loss and the norm of every gradient, is what one process prints.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_sdpa import scaled_dot_product_attention
from jax_sdpa.attention.bias import KeyLengths, causal
from jax_sdpa.sharding import context_parallel_attention

B, HQ, H, L, E = 2, 4, 2, 256, 16
DEVICES = 2  # of a process


def operands() -> dict[str, np.ndarray]:
    """Whole, the same in every process; a real program would read its own part from disk."""
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((B, heads, L, E)).astype(np.float32) for name, heads in (("q", HQ), ("k", H), ("v", H))}


def figures(mesh: Mesh | None) -> dict[str, float]:
    """The loss and the norms of its gradients: over the mesh's axis "sequence", or on one device."""
    lengths = jnp.array([L, L // 3])
    mask = causal() & KeyLengths(lengths)

    def loss(given: dict[str, jax.Array]) -> jax.Array:
        q, k, v = given["q"], given["k"], given["v"]
        options = {"enable_gqa": True, "dropout_p": 0.1, "dropout_rng": jax.random.key(7)}
        if mesh is None:
            return jnp.sin(scaled_dot_product_attention(q, k, v, mask, **options)).mean()
        out = context_parallel_attention(q, k, v, mask, mesh=mesh, axis_name="sequence", method="ring", **options)
        return jnp.sin(out).mean()

    @jax.jit
    def step(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(given)
        return {"loss": value} | {f"|d{name}|": jnp.linalg.norm(x) for name, x in gradients.items()}

    given = operands()
    if mesh is None:
        return {name: float(x) for name, x in step({name: jnp.asarray(x) for name, x in given.items()}).items()}
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "sequence"))
    placed = {name: jax.make_array_from_callback(x.shape, sharding, lambda at, x=x: x[at]) for name, x in given.items()}
    return {name: float(x) for name, x in step(placed).items()}


def one_of(process: int, of: int, coordinator: str) -> None:
    """This process's part; the first one prints."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=of, process_id=process)
    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    found = figures(mesh)
    if process == 0:
        print(json.dumps({"processes": jax.process_count(), "devices": jax.device_count(), **found}), flush=True)
    jax.distributed.shutdown()


def start(of: int = 2) -> dict[str, float]:
    """What `of` processes on this machine find."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "jax_sdpa.examples.two_processes", "--of", str(of), "--coordinator", coordinator]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([*command, "--process", str(i)], **pipes) for i in range(of)]
    try:
        told = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(process.returncode for process in running):
        raise RuntimeError("a process failed:\n" + "\n".join(errors[-2000:] for _, errors in told))
    return json.loads(told[0][0].strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--process", type=int, help="this process's number; without it, both are started here")
    parser.add_argument("--of", type=int, default=2, help="processes")
    parser.add_argument("--coordinator", default="localhost:9876", help="HOST:PORT of process 0")
    args = parser.parse_args()
    if args.process is not None:
        one_of(args.process, args.of, args.coordinator)
        return
    print("several processes:", start(args.of))
    print("one process, one device:", figures(None))


if __name__ == "__main__":
    main()
