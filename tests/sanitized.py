"""`compute-sanitizer --tool racecheck python tests/sanitized.py [NAME ...]`: small kernels for NVIDIA's checker to watch; on a GPU.

Without names every case of `test_hopper_forward.CASES`; `planted` is a kernel that has a race, to see the checker find one.
"""

import sys

import jax
import jax.numpy as jnp
from oracle import check
from test_hopper_forward import CASES, on_kernel


def planted():
    """Two warpgroups write the same shared memory, and nothing orders them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(out_ref, memory):
        wg = jax.lax.axis_index("wg")
        memory[...] = plgpu.layout_cast(jnp.full((128,), wg, jnp.float32), plgpu.Layout.WG_STRIDED((128,), 1))
        plgpu.commit_smem()
        pl.when(wg == 0)(lambda: plgpu.copy_smem_to_gmem(memory, out_ref))
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), num_threads=2, thread_name="wg",
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )()  # fmt: skip


def main(names):
    for name in names or CASES:
        if name == "planted":
            jax.block_until_ready(planted())
        else:
            problem, options = CASES[name]()
            problem = problem.rounded(options.get("dtype", jnp.bfloat16))
            check(problem, on_kernel(problem, **options, interpret=False))
        print("ran", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
