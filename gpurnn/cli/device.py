"""The option --device, and what it comes to."""

from typing import Annotated

import typer

from gpurnn.cli.output import note
from gpurnn.cuda.devices import chosen, driver_present
from gpurnn.language_model import LanguageModel

__all__ = ["DeviceOption", "device_of", "placed"]

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="Where to compute: cpu, cuda (or cuda:N), or auto (cuda if it is there)."
    ),
]


def device_of(device: str, *, tell: bool = False) -> str:
    """Return the device to be used, and say which, if that was left to us.

    Where there is no GPU, and nothing is installed for one, only those hear of it who have much to
    compute: ``tell``.

    Raises:
        ValueError: there is no such device, or something that it needs is not installed.
    """
    try:
        where, why_not_gpu = chosen(device)
    except ImportError as e:
        raise ValueError(str(e)) from e
    if why_not_gpu is not None:
        if not (tell or driver_present()) and isinstance(why_not_gpu, ImportError):
            return where
        note(f"device cpu: no GPU can be used ({why_not_gpu})")
    elif device == "auto":
        note(f"device {where}")
    return where


def placed(model: LanguageModel, device: str) -> LanguageModel:
    """Return the model, on the device that the option says."""
    return model.to(device_of(device))
