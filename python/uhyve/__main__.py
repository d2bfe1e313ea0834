"""``python -m uhyve`` is the command ``uhyve``."""

from uhyve.cli import main

if __name__ == "__main__":
    main()
