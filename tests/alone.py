"""The kernels' cases in a process of their own, on a GPU: for NVIDIA's checkers to watch, and to see the same bits come out.

    compute-sanitizer --tool racecheck --kernel-name kns=mosaic python tests/alone.py [NAME ...]

Without names every case of `test_hopper_forward.CASES`, held to the oracle; prints a hash of the results of each; "backward: NAME" is
one of `test_hopper_backward.CASES`. `planted` is a kernel that has a race, to see the checker find one: on 2026-11-25 it did not (NOTES.md), so its silence about the others says nothing.
"""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from oracle import check
from test_hopper_backward import CASES as BACKWARD
from test_hopper_backward import hold, on_kernels
from test_hopper_forward import CASES, on_kernel


def planted(x):
    """A warpgroup reads what another one writes to shared memory, and nothing orders them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WG_STRIDED((128,), 1)

    def kernel(x_ref, out_ref, memory):
        wg = jax.lax.axis_index("wg")

        @pl.when(wg == 0)
        def _():
            memory[...] = plgpu.load(x_ref, layout=layout)

        @pl.when(wg == 1)
        def _():
            out_ref[...] = plgpu.load(memory, layout=layout)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), num_threads=2, thread_name="wg",
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(x)  # fmt: skip


def main(names):
    for name in names or CASES:
        if name == "planted":
            jax.block_until_ready(planted(jnp.ones(128)))
            print(name, flush=True)
            continue
        gradients = name.startswith("backward: ")
        problem, options = (BACKWARD if gradients else CASES)[name.removeprefix("backward: ")]()
        problem = problem.rounded(options.get("dtype", jnp.bfloat16))
        got = (on_kernels if gradients else on_kernel)(problem, **options, interpret=False)
        (hold if gradients else check)(problem, got)
        bits = b"".join(np.ascontiguousarray(got[part]).view(np.uint8).tobytes() for part in sorted(got))
        print(name, hashlib.sha256(bits).hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
