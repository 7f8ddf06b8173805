"""Entry point of ``python -m hawqtool``."""

from hawqtool.cli.app import main

if __name__ == "__main__":
    main()
