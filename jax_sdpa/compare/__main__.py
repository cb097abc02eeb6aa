"""`python -m jax_sdpa.compare` is the `jax-sdpa` command."""

import sys

from jax_sdpa.compare.command import main

if __name__ == "__main__":
    sys.exit(main())
