"""Add a trained model to the package: a small folder with its adapter in bfloat16, run record, card and notices.

    python tools/pack_model.py runs/best sempa-gemma3-270m

Run it from an editable install. `sempa_st.load(NAME)` then opens the model anywhere the package is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sempa_st.errors import SempaError
from sempa_st.folder.shipped import SHIPPED_MODELS, pack_model
from sempa_st.utils.files import read_json


def main() -> int:
    """Pack one model; return exit code 2 if it cannot be shipped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder that `sempa train` wrote, on the embedded base")
    parser.add_argument("name", help="name of the model, such as sempa-gemma3-270m")
    parser.add_argument("--results", help="JSON file with tables of measured figures, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace the model of that name")
    args = parser.parse_args()
    if Path(args.name).name != args.name:
        parser.error(f"{args.name!r} is no plain name")
    try:
        results = read_json(Path(args.results)) if args.results else None
        packed = pack_model(args.folder, SHIPPED_MODELS / args.name, results=results, overwrite=args.overwrite)
    except SempaError as error:
        print(f"pack_model: {error}", file=sys.stderr)
        return 2
    for path in sorted(packed.iterdir()):
        print(f"{path.stat().st_size:>10,}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
