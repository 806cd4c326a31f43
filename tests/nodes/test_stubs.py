"""The type stubs in typings/ declare nothing that the real ComfyUI lacks."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "support"))
import comfy_host

comfy_host.skip_without_host()
comfy_host.load_pack()

pytestmark = pytest.mark.slow
STUBS = comfy_host.PACK / "typings"


def module_of(path: Path):
    name = ".".join(path.relative_to(STUBS).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith("comfy_api.latest."):  # an attribute there, not a file
        return getattr(importlib.import_module("comfy_api.latest"), name.rsplit(".", 1)[1])
    return importlib.import_module(name)


def missing(body: list[ast.stmt], real: object, where: str) -> list[str]:
    """Functions, classes and parameters of a stub that the real module or class does not have."""
    problems = []
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not hasattr(real, node.name):
            problems.append(f"{where}.{node.name}")
        elif isinstance(node, ast.ClassDef):
            problems += missing(node.body, getattr(real, node.name), f"{where}.{node.name}")
        else:
            problems += missing_parameters(node, getattr(real, node.name), f"{where}.{node.name}")
    return problems


def missing_parameters(stub: ast.FunctionDef | ast.AsyncFunctionDef, real, where: str) -> list[str]:
    parameters = inspect.signature(real).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    names = {p.name for p in parameters} | {"cls"}  # a bound class method shows none
    return [f"{where}({a.arg})" for a in (*stub.args.args, *stub.args.kwonlyargs) if a.arg not in names]


@pytest.mark.parametrize("path", sorted(STUBS.rglob("*.pyi")), ids=lambda p: p.relative_to(STUBS).as_posix())
def test_every_declared_name_and_parameter_exists(path):
    assert missing(ast.parse(path.read_text(encoding="utf-8")).body, module_of(path), path.stem) == []
