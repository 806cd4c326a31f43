"""Experiments on the embedded models: methods, grid, cells, statistics, report. Run with `python -m benchmarks`.

Part of the repository, not of the installed package. Imports point downward only: benchmarks -> trainer ->
comfyui_pcpo, and nothing imports benchmarks.
"""
