"""A training run without ComfyUI: `python -m trainer`. The nodes train with the same loop."""
