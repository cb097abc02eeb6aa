"""The comparison with PyTorch, `jax-sdpa compare`, and `jax-sdpa explain`: the same lines through both frameworks, measured.

`cases` holds the calls, `frameworks` the two faces that a call is written against, `inputs` the tensors, `measure` errors, times,
memory and the rule of when a result holds, `runner` takes a case through all of it, `report` and `page` show what came out,
`command` reads the command line. `devices` is the only file that knows which device a framework uses. torch, rich, matplotlib
and safetensors are the extra `jax-sdpa[compare]`, imported where they are used; `explain` needs none of them.
"""
