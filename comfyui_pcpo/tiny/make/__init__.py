"""How the embedded models were made: `python -m comfyui_pcpo.tiny.make --help`."""
