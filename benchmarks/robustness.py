"""Attack the package and count what fails: kills, full disks, hostile input, odd numbers, leaks, races, long runs.

    python -m benchmarks.robustness --output FILE.json            # all of it, three hours of two cores
    python -m benchmarks.robustness --quick --output FILE.json    # a few trials of each attack, 4 minutes

    python -m benchmarks.robustness --only haul --output FILE.json     # what the file says of the other attacks stays

Everything happens in a scratch folder, on tiny random models. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.attacks import disk, files, haul, kill, numbers, push, races, secrets, texts
from benchmarks.attacks.world import Outcome, World
from sempa_st.utils.files import read_json, write_json
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

ATTACKS: dict[str, Callable[[World], Iterable[Outcome]]] = {
    "kill": kill.attack,
    "push": push.attack,
    "disk": disk.attack,
    "texts": texts.attack,
    "numbers": numbers.attack,
    "files": files.attack,
    "secrets": secrets.attack,
    "races": races.attack,
    "haul": haul.attack,
}


def main() -> int:
    """Run the attacks named on the command line, print their table and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few trials of each attack")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="attacks (default: all)")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    output = Path(args.output)
    record: dict[str, Any] = read_json(output) if output.exists() and len(args.only) < len(ATTACKS) else {}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as scratch:
        world = World.build(Path(scratch), quick=args.quick)
        for name in args.only:
            record[name] = {**run_info(), "quick": args.quick, "outcomes": (found := [])}
            for outcome in ATTACKS[name](world):
                outcomes.append(outcome)
                found.append(asdict(outcome))
                print(f"{outcome.attack}: {len(outcome.failures)} of {outcome.trials} failed", file=sys.stderr)
                write_json(output, record)
    print(report(outcomes))
    return int(any(outcome.failures for outcome in outcomes))


def report(outcomes: Iterable[Outcome]) -> str:
    """Return a table of the attacks, and the failures below it."""
    outcomes = list(outcomes)
    rows = [[o.attack, o.trials, len(o.failures), o.seconds] for o in outcomes]
    failures = [f"{outcome.attack}: {failure}" for outcome in outcomes for failure in outcome.failures]
    return "\n".join([table(["attack", "trials", "failures", "seconds"], rows), *failures])


if __name__ == "__main__":
    sys.exit(main())
