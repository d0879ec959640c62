"""``python -m gpurnn.doctor``: the doctor without the command line's packages.

Exit code 0 if all that is installed works (a machine without a GPU is fine), else 1.
"""

import argparse
import json
from collections.abc import Sequence

from gpurnn.doctor import examine, report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpurnn.doctor", description=__doc__)
    parser.add_argument("--skip-checks", action="store_true", help="compile and run no kernel")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    given = parser.parse_args(arguments)
    findings = []
    for finding in examine(checks=not given.skip_checks):
        findings.append(finding)
        if not given.json:
            print(f"{finding.status:<7}  {finding.name}: {finding.detail}", flush=True)
            if finding.advice:
                print(f"         → {finding.advice}", flush=True)
    found = report(findings)
    if given.json:
        print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    return 0 if found["works"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
