"""`python -m dvpa_train`: the same as `dvpa-train`."""

import sys

from dvpa_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
