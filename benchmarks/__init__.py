"""Evidence on the embedded models: contenders, grid, cells, statistics, report. `python -m trainer benchmark` runs it.

Part of the repository, not of the installed package. Arrows: benchmarks -> trainer -> comfyui_pcpo.
"""
