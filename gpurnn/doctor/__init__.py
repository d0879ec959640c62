"""What is installed, which GPU there is, and whether the kernels give right numbers on it.

``examine`` yields findings and raises nothing: what fails is a finding with the error's text.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from gpurnn.doctor import device, kernels, packages, storage
from gpurnn.doctor.findings import Finding, Status, found_by

__all__ = ["Finding", "Status", "broken", "examine", "report"]


def examine(*, checks: bool = True) -> Iterator[Finding]:
    """Yield one finding after the other.

    Args:
        checks: also compile a kernel and hold kernels against the reference: some seconds.
    """
    parts: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("packages", packages.packages),
        ("versions", packages.versions_fit),
        ("GPU", device.devices),
        ("kernel cache", storage.kernel_cache),
    ]
    if checks:
        parts += [
            ("compiling", kernels.compiled),
            ("emulator", kernels.emulated_checks),
            ("GPU checks", kernels.gpu_checks),
        ]
    for name, part in parts:
        yield from found_by(name, part)


def broken(findings: Iterable[Finding]) -> bool:
    """Whether something that is installed does not work, or gives wrong numbers."""
    return any(finding.status == "failed" for finding in findings)


def report(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return findings as what is printed as JSON: whether all works, and each of them."""
    return {"works": not broken(findings), "findings": [asdict(finding) for finding in findings]}
