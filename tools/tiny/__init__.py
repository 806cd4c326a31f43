"""Makes the embedded models of comfyui_pcpo.tiny; run `python -m tools.tiny --help`."""
