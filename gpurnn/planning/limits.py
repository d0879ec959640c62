"""What GPUs can hold, as far as a plan depends on it."""

from dataclasses import dataclass

__all__ = ["DEVICES", "Limits", "limits"]


@dataclass(frozen=True)
class Limits:
    """What a GPU can hold: bytes of shared memory and 32-bit registers, per multiprocessor (SM)."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    clock_ghz: float
    registers_per_multiprocessor: int = 65_536
    threads_per_multiprocessor: int = 2_048
    half_rate_float64: bool = True

    @property
    def tensor_cores(self) -> bool:
        """Whether there are the tensor core instructions that kernels use, of 8.0 and later."""
        return self.compute_capability >= (8, 0)

    @property
    def largest_cluster(self) -> int:
        """Blocks of the largest thread block cluster, 0 where there are none.

        8 are portable; 9.0 and 10.x let a kernel ask for 16. (CUDA C++ Programming Guide, thread
        block clusters.)
        """
        major, _ = self.compute_capability
        return 0 if major < 9 else 16 if major in (9, 10) else 8


DEVICES = {
    "A100": Limits("NVIDIA A100", (8, 0), 108, 166_912, 167_936, 1.41),
    "H100": Limits("NVIDIA H100", (9, 0), 132, 232_448, 233_472, 1.755),
    "H200": Limits("NVIDIA H200", (9, 0), 132, 232_448, 233_472, 1.755),
}
"""GPUs one can plan for without having one. (CUDA C++ Programming Guide, compute capabilities.)"""


def limits(name: str, device: object) -> Limits:
    """Return the limits that ``device`` names, or is; ``name`` is the argument it came as."""
    if isinstance(device, Limits):
        return device
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    raise ValueError(
        f"{name} is {device!r}: expected one of {', '.join(DEVICES)}, or a planning.Limits"
    )
