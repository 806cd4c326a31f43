"""How the embedded models were made: `python -m tools.tiny --help`."""
