"""ComfyUI's entry: binds comfyui_pcpo under its own name and hands over the nodes. Anywhere else it does nothing."""

import importlib.util
import re
import sys
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parent / "comfyui_pcpo"


def _bind_library() -> None:
    """Load comfyui_pcpo from this folder once; another copy would give two sets of classes."""
    loaded = sys.modules.get("comfyui_pcpo")
    if loaded is not None:
        other = Path(str(loaded.__file__)).resolve().parent
        if other != _LIBRARY:
            raise ImportError(
                f"comfyui_pcpo is already loaded from {other}; this pack's copy is in {_LIBRARY}. "
                "Uninstall the first, or keep one copy of the pack in custom_nodes."
            )
        return
    spec = importlib.util.spec_from_file_location("comfyui_pcpo", _LIBRARY / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_pcpo"] = module
    spec.loader.exec_module(module)


def _require_packages() -> None:
    """Name what requirements.txt lists and is not installed, now instead of in the middle of a workflow."""
    file = Path(__file__).resolve().parent / "requirements.txt"
    modules = {"open_clip_torch": "open_clip", "pillow": "PIL", "tomli-w": "tomli_w"}
    missing = []
    for line in file.read_text(encoding="utf-8").splitlines():
        name, marker = re.split(r"[<>=;# ]", line, maxsplit=1)[0], "python_version" in line
        if name and not (marker and sys.version_info >= (3, 11)):
            found = importlib.util.find_spec(modules.get(name, name)) is not None
            missing += [] if found else [name]
    if missing:
        raise ImportError(
            f"PCPO needs packages that are not installed: {', '.join(missing)}. Install them with "
            f'"{sys.executable}" -m pip install -r "{file}", then restart ComfyUI.'
        )


# ComfyUI names a pack after its path; test runners and installers import this file under other names.
if ("/" in __name__ or "\\" in __name__) and importlib.util.find_spec("comfy_api") is not None:
    _require_packages()
    _bind_library()
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
