"""Run the command line as ``python -m sempa_st``, for instance under ``accelerate launch``."""

import sys

from sempa_st.cli import main

if __name__ == "__main__":
    sys.exit(main())
