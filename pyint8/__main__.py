"""The command line: `python -m pyint8 ...`, which is also `pyint8 ...`."""

from pyint8.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
