"""The import graph of our packages: arrows point downward, there are no circles, and a name has one meaning.

Every import counts: in functions and under TYPE_CHECKING too, absolute or relative.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BELOW = {
    "comfyui_pcpo": set(),
    "trainer": {"comfyui_pcpo"},
    "nodes": {"comfyui_pcpo", "trainer"},
    "benchmarks": {"comfyui_pcpo", "trainer"},
    "tools": {"comfyui_pcpo", "trainer"},
}
"""Each package with those that it may import besides itself. benchmarks and tools are not shipped."""
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths"}

CONVENTIONS = {"main", "logger"}  # an entry point, and a module's logger: one meaning everywhere

Graph = dict[str, set[str]]


def module_files(root: Path) -> dict[str, Path]:
    """Dotted name of every module of our packages, with its file."""
    files = {}
    for package in BELOW:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_targets(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """(module, name) of everything imported anywhere in a file; the name is empty for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            kept = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def import_graph(root: Path) -> Graph:
    """Module -> what it imports: our own modules by their full name, others by their top-level name."""
    files = module_files(root)
    graph: Graph = {}
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges = set()
        for base, name in import_targets(tree, module, path.name == "__init__.py"):
            full = f"{base}.{name}" if base else name
            if full in files:
                edges.add(full)
            elif base in files:
                edges.add(base)
            else:
                edges.add(full.split(".")[0])
        graph[module] = edges - {module}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module] & graph.keys()):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            position = stack.index(module)
            component = stack[position:]
            del stack[position:]
            if len(component) > 1:
                components.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return components


def arrows_upward(graph: Graph) -> list[str]:
    """Imports that the floors forbid, as `importer -> imported`."""
    forbidden = []
    for module, targets in graph.items():
        package = module.split(".")[0]
        refused = (BELOW.keys() - BELOW[package] - {package}) | (HOST if package != "nodes" else set())
        forbidden += [f"{module} -> {target}" for target in sorted(targets) if target.split(".")[0] in refused]
    return forbidden


def defined_names(path: Path) -> Iterator[str]:
    """Functions, classes and constants at the top level of a file, without private and conventional ones."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_") and name not in CONVENTIONS)


def shared_names(root: Path) -> dict[str, list[str]]:
    """Names that several modules define, with these modules."""
    places = defaultdict(set)
    for module, path in module_files(root).items():
        for name in defined_names(path):
            places[name].add(module)
    return {name: sorted(modules) for name, modules in sorted(places.items()) if len(modules) > 1}


def test_no_modules_import_each_other_in_a_circle():
    assert circles(import_graph(ROOT)) == []


def test_imports_point_downward():
    assert arrows_upward(import_graph(ROOT)) == []


def test_a_top_level_name_is_defined_in_one_module():
    assert shared_names(ROOT) == {}


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """Two circles, three arrows upward and one name with two meanings."""
    sources = {
        "comfyui_pcpo/__init__.py": "",
        "comfyui_pcpo/credit.py": "def step():\n    from comfyui_pcpo import transition\n",
        "comfyui_pcpo/transition.py": "from comfyui_pcpo.credit import step\nCOUNT = 0\n",
        "trainer/__init__.py": "",
        "trainer/loop.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import Plan\n",
        "trainer/plan.py": "from . import loop\nclass Plan: ...\n",
        "trainer/host.py": "def f():\n    import comfy.utils\n    from ..nodes import model\n",
        "nodes/__init__.py": "",
        "nodes/model.py": "from ..trainer.plan import Plan\nCOUNT: int = 1\n_private = 1\n",
        "benchmarks/cell.py": "import nodes.model\nfrom comfyui_pcpo.credit import step\n_private = 2\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_circles_are_found_through_functions_and_type_checking(small_project: Path):
    assert circles(import_graph(small_project)) == [
        ["comfyui_pcpo.credit", "comfyui_pcpo.transition"],
        ["trainer.loop", "trainer.plan"],
    ]


def test_arrows_upward_are_found_however_they_are_written(small_project: Path):
    assert arrows_upward(import_graph(small_project)) == [
        "trainer.host -> comfy",
        "trainer.host -> nodes.model",
        "benchmarks.cell -> nodes.model",
    ]


def test_a_name_with_two_meanings_is_found(small_project: Path):
    assert shared_names(small_project) == {"COUNT": ["comfyui_pcpo.transition", "nodes.model"]}
