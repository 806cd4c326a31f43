"""Training without ComfyUI: `pcpo`, or `python -m trainer` in a clone. The nodes use the same training loop."""
