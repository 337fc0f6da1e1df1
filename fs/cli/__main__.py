"""`python -m apollofs.fs.cli`: the command, where its script is not on the PATH."""

import sys

from apollofs.fs.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
