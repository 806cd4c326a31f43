"""A package, so that `tests.golden` is this folder: the wheel of torch-fidelity 0.4.0 installs a package `tests`."""
