"""A ComfyUI host for tests: its modules in this process, with this pack loaded as ComfyUI loads it.

After an intended change, `COMFYUI_PATH=... python tests/support/comfy_host.py` regenerates the golden schemas and the
English texts.
"""

import asyncio
import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("COMFYUI_PATH", "")
REASON = "COMFYUI_PATH is not set. Set it to a ComfyUI checkout (0.33 or newer) and run the tests with its Python."


def skip_without_host() -> None:
    """Skip the whole module if ComfyUI is not available."""
    if not COMFYUI or not (Path(COMFYUI) / "comfy").is_dir():
        pytest.skip(REASON, allow_module_level=True)


@functools.cache
def load_pack() -> dict:
    """Node classes by id, from this working tree, loaded by ComfyUI's own loader."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    sys.path.insert(0, COMFYUI)
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import torch

        torch.set_num_threads(1)
        import folder_paths

        base = Path(tempfile.mkdtemp(prefix="pcpo-host-"))
        folder_paths.set_output_directory(str(base / "output"))
        folder_paths.set_temp_directory(str(base / "temp"))
        import nodes

        extras = Path(COMFYUI) / "comfy_extras"
        for file in ("nodes_train.py", "nodes_custom_sampler.py"):
            assert asyncio.run(nodes.load_custom_node(str(extras / file), module_parent="comfy_extras"))
        assert asyncio.run(nodes.load_custom_node(str(PACK)))
        return nodes.NODE_CLASS_MAPPINGS
    finally:
        sys.argv = argv


def pack_module(name: str):
    """A module of the pack, under the mangled name that ComfyUI gives it."""
    import importlib

    return importlib.import_module(str(PACK).replace(".", "_x_") + "." + name)


def execute(node: str, *args, **kwargs):
    """Execute a node as ComfyUI does, under inference mode."""
    import torch

    node_class = load_pack()[node]
    with torch.inference_mode():
        if hasattr(node_class, "FUNCTION") and not hasattr(node_class, "define_schema"):  # a stock node of the old API
            return getattr(node_class(), node_class.FUNCTION)(*args, **kwargs)
        return node_class.execute(*args, **kwargs).result


def own_nodes() -> list:
    return pack_module("nodes").NODES


def schemas() -> dict:
    """The stable part of the schemas: inputs with type, default and whether advanced, outputs, in order."""
    stable = {}
    for node in own_nodes():
        schema = node.GET_SCHEMA()
        stable[schema.node_id] = {
            "inputs": [
                [i.id, i.get_io_type(), vars(i).get("default"), *["advanced"] * bool(vars(i).get("advanced"))]
                for i in schema.inputs
            ],
            "outputs": [[o.display_name, o.get_io_type()] for o in schema.outputs],
        }
    return stable


def texts() -> dict:
    """The English texts of the nodes, for locales/."""
    by_id = {}
    for node in own_nodes():
        schema = node.GET_SCHEMA()
        by_id[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.display_name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
    return by_id


if __name__ == "__main__":
    load_pack()
    for name, content in (("tests/golden/nodes.json", schemas()), ("locales/en/nodeDefs.json", texts())):
        (PACK / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
