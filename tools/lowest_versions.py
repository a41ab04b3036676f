"""Print the lowest version that pyproject.toml allows of each direct dependency, extras included, as pip constraints.

python tools/lowest_versions.py > lowest.txt && pip install -c lowest.txt -e ".[dev]"
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_LOWER_BOUND = re.compile(r"([\w.-]+)[>=]=([\w.]+)")


def lowest_versions(pyproject: str) -> list[str]:
    """Return ``name==version`` for each requirement with a lower bound or an exact version, sorted.

    Args:
        pyproject: Content of a pyproject.toml. An extra that names other extras of the package has no bound itself.
    """
    project = tomllib.loads(pyproject)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    matches = (_LOWER_BOUND.match(requirement) for group in groups for requirement in group)
    return sorted({f"{match[1]}=={match[2]}" for match in matches if match})


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    print("\n".join(lowest_versions(pyproject.read_text(encoding="utf-8"))))
