"""`python -m dvpa` is the `dvpa` command."""

from dvpa.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
