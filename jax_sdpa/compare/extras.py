"""The optional libraries of the comparison, imported when they are needed and named with their extra when they are not there."""

from __future__ import annotations

import importlib
from typing import Any

EXTRA = "jax-sdpa[compare]"


class MissingExtraError(ImportError):
    """A library of the extra `jax-sdpa[compare]` is not installed; the message says how to get it."""


def need(module: str) -> Any:
    """The module, imported; MissingExtraError if its library is not installed."""
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != library:
            raise  # the library is there, something that it needs is not: its own message says more
        raise MissingExtraError(f"the comparison needs {library}, which is not installed: pip install '{EXTRA}'") from error
