"""`python -m trainer`."""

import sys

try:
    from .cli.main import main

    status = main()
except KeyboardInterrupt:  # while the libraries were imported
    status = 130
sys.exit(status)
