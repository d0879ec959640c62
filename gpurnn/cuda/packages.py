"""Packages that only kernels need, imported where they are used."""

import importlib
from typing import Any

__all__ = ["needed"]


def needed(module: str, why: str, extra: str) -> Any:
    """Import a module.

    Raises:
        ImportError: it is not there; the message says why it is wanted, and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(
            f"{why}, and {module} could not be imported ({e}): pip install 'gpurnn[{extra}]'"
        ) from e
