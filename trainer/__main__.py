"""`python -m trainer`, or from anywhere `python FOLDER/trainer`, also where Python ignores the current folder."""

import sys
from pathlib import Path

if __package__:
    from .cli.main import main
else:  # run by its folder, which then stands on the path where the one above it is needed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from trainer.cli.main import main

sys.exit(main())
