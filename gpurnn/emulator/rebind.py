"""A kernel's functions, made again with everything they refer to replaced by its emulation.

New function objects with the same instructions, new globals and new closures: nobody else's are
touched.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import os
import sys
import sysconfig
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gpurnn.emulator.casts import cast
from gpurnn.emulator.errors import UnsupportedError
from gpurnn.emulator.floats import MATH
from gpurnn.emulator.libdevice import LIBDEVICE
from gpurnn.emulator.machine import Code

if TYPE_CHECKING:
    from gpurnn.emulator.namespace import Namespace

__all__ = ["Rebinder", "python_function"]


def python_function(kernel: Any) -> FunctionType:
    """Return the function a kernel was made from, or the function itself."""
    function = getattr(kernel, "py_func", kernel)
    if not isinstance(function, FunctionType):
        raise TypeError(
            f"kernel is {kernel!r}: expected a function written for Numba CUDA, or what "
            "cuda.jit makes of one"
        )
    return function


def _float(x: Any = 0) -> Any:
    return x if isinstance(x, np.floating) else np.float64(x)


_INT64 = cast(np.dtype(np.int64))

_BUILTINS = {**vars(builtins), "float": _float, "int": _INT64}


# Where the standard library lies, and below it what others install.
_LIBRARY = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))

# Plain numbers, that differ from thread to thread: only ``cuda.laneid`` can be replaced.
_VALUES = ("laneid", "warpsize")


class Rebinder:
    """Replaces what a kernel refers to, each thing once."""

    def __init__(self, cuda: Namespace, codes: dict[int, Code], constants: Any):
        self._cuda = cuda
        self._codes = codes
        self._constants = constants
        # By identity; the original is kept alive beside its replacement.
        self._done: dict[int, tuple[Any, Any]] = {}
        numba = sys.modules.get("numba.cuda")
        self._numba_types: tuple[Any, ...] = ()
        if numba is not None:
            self._register_numba(numba)
        for name, twin in MATH.items():
            original = getattr(math, name, None)
            if isinstance(original, BuiltinFunctionType):
                self._done[id(original)] = (original, twin)
        self._done[id(math)] = (math, _Twins("math", MATH))
        for original, twin in ((float, _float), (int, _INT64)):
            self._done[id(original)] = (original, twin)

    def __call__(self, value: Any) -> Any:
        """Return what stands for ``value`` in the emulated kernel."""
        found = self._done.get(id(value))
        if found is not None:
            return found[1]
        twin = getattr(value, "emulated", None)
        if callable(twin):
            return self._keep(value, functools.partial(twin, self._cuda))
        if hasattr(value, "py_func"):
            return self._keep(value, self.kernel(value.py_func))
        if isinstance(value, FunctionType):
            return value if _is_library(value) else self._function(value)
        if isinstance(value, ModuleType):
            return self._keep(value, _Module(value, self))
        if isinstance(value, tuple | list):
            return self._sequence(value)
        return self._constant(value)

    def kernel(self, function: FunctionType) -> Any:
        """Return a kernel or device function made again, wherever it comes from."""
        found = self._done.get(id(function))
        return self._function(function) if found is None else found[1]

    def _constant(self, value: Any) -> Any:
        if type(value) is float:
            return np.float64(value)
        if isinstance(value, np.integer):
            return int(value)
        if self._scalar(value):
            return cast(np.dtype(str(value)))
        if isinstance(value, type) and issubclass(value, np.integer | np.bool):
            return cast(np.dtype(value))
        if isinstance(value, np.ndarray):
            return self._keep(value, self._constants(value))
        module = type(value).__module__
        if module.startswith("numba.") and type(value).__name__ == "_Intrinsic":
            return self._keep(value, _Missing(f"the intrinsic {_name(value)}"))
        return value

    def _scalar(self, value: Any) -> bool:
        return isinstance(value, self._numba_types)

    def _keep(self, value: Any, twin: Any) -> Any:
        self._done[id(value)] = (value, twin)
        return twin

    def _sequence(self, value: Any) -> Any:
        items = [self(v) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

    def _function(self, function: FunctionType) -> Any:
        module = (function.__module__ or "").partition(".")[0]
        if module == "numba":
            return self._keep(function, _Missing(f"{function.__module__}.{function.__name__}"))
        code = self._code(function.__code__)
        names: dict[str, Any] = {"__builtins__": _BUILTINS, "__name__": function.__module__}
        cells = tuple(CellType() for _ in function.__closure__ or ())
        new = FunctionType(code, names, function.__name__, None, cells)
        self._keep(function, new)
        if function.__defaults__:
            new.__defaults__ = tuple(self(v) for v in function.__defaults__)
        if function.__kwdefaults__:
            new.__kwdefaults__ = {k: self(v) for k, v in function.__kwdefaults__.items()}
        for name in _names(code):
            if name in function.__globals__:
                names[name] = self(function.__globals__[name])
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self(original.cell_contents)
            except ValueError:  # an empty cell: the name was never assigned
                continue
        return new

    def _code(self, code: CodeType) -> CodeType:
        """Return the code with its float constants as float64, which they are in Numba."""
        new = code.replace(co_consts=tuple(map(self._literal, code.co_consts)))
        self._codes[id(new)] = Code(new)
        return new

    def _literal(self, value: Any) -> Any:
        if type(value) is float:
            return np.float64(value)
        if type(value) is tuple:
            return tuple(map(self._literal, value))
        return self._code(value) if isinstance(value, CodeType) else value

    def _register_numba(self, numba: Any) -> None:
        cuda = self._cuda
        scalars = importlib.import_module("numba.core.types.scalars")
        self._numba_types = (scalars.Integer, scalars.Float, scalars.Boolean, scalars.Complex)
        self._done[id(numba)] = (numba, cuda)
        libdevice = importlib.import_module("numba.cuda.libdevice")
        twins = _Twins("libdevice", LIBDEVICE)
        self._done[id(libdevice)] = (libdevice, twins)
        cuda.add({n: cast(np.dtype(str(t))) for n, t in vars(numba).items() if self._scalar(t)})
        cuda.add({"libdevice": twins, "types": self(numba.types)})
        for name, original in vars(libdevice).items():
            if isinstance(original, FunctionType):
                missing = _Missing(f"libdevice.{name}")
                self._done[id(original)] = (original, LIBDEVICE.get(name, missing))
        for name in ("threadIdx", "blockIdx"):
            original = getattr(numba, name)
            self._done[id(original)] = (original, _Index(cuda, name))
        own = [n for n in dir(type(cuda)) if not n.startswith("_")]
        for name in {*own, *vars(cuda)} & vars(numba).keys() - {"threadIdx", "blockIdx"}:
            original = getattr(numba, name)
            twin = getattr(cuda, name) if name not in _VALUES else _Missing(f"{name} by itself")
            self._done[id(original)] = (original, twin)
        self._done[id(numba.cg.this_grid)] = (numba.cg.this_grid, cuda.cg.this_grid)
        self._done[id(numba.cg)] = (numba.cg, cuda.cg)


class _Missing:
    """Stands for something without an emulation; using it raises."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def _used(self, *args: Any) -> NoReturn:
        self._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = _used
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __lshift__ = __rlshift__ = _used
    __rshift__ = __lt__ = __le__ = __gt__ = __ge__ = __index__ = __bool__ = __getitem__ = _used
    __xor__ = __rxor__ = __or__ = __ror__ = __truediv__ = __rtruediv__ = _used

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(
            f"{self._name} has no emulation: give it an attribute 'emulated', a function that "
            "takes the emulator's cuda and then the arguments"
        )


class _Twins:
    """A module whose contents are a table of twins."""

    def __init__(self, name: str, table: dict[str, Any]):
        self._name = name
        self.__dict__.update(table)

    def __getattr__(self, name: str) -> NoReturn:
        raise UnsupportedError(f"{self._name}.{name} has no emulation")


class _Module:
    """A module whose contents are replaced as they are asked for."""

    def __init__(self, module: ModuleType, rebind: Rebinder):
        self._module = module
        self._rebind = rebind

    def __getattr__(self, name: str) -> Any:
        value = self._rebind(getattr(self._module, name))
        self.__dict__[name] = value
        return value


class _Index:
    """``threadIdx`` or ``blockIdx`` imported by itself."""

    def __init__(self, cuda: Namespace, name: str):
        self._cuda = cuda
        self._name = name

    def __getattr__(self, axis: str) -> Any:
        return getattr(getattr(self._cuda, self._name), axis)


def _is_library(function: FunctionType) -> bool:
    """Whether a function is NumPy's or the standard library's, by where its code lies."""
    file = function.__code__.co_filename
    if (function.__module__ or "").partition(".")[0] == "numpy" or file.startswith("<frozen "):
        return True
    return file.startswith(_LIBRARY) and not any(part in file for part in _INSTALLED)


def _names(code: CodeType) -> set[str]:
    """Return the names a function's code, and code inside it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _name(value: Any) -> str:
    return str(getattr(value, "_name", None) or getattr(value, "__name__", None) or value)
