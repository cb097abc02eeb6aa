"""The example with `jax.distributed`: two processes, four devices, Gloo; the numbers of one process."""

import numpy as np

from jax_sdpa.examples import two_processes


def test_two_processes_find_what_one_does():
    found, wanted = two_processes.start(2), two_processes.figures(None)
    assert (found.pop("processes"), found.pop("devices")) == (2, 4)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
