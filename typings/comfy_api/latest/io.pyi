# ComfyUI calls this module comfy_api.latest.io as well, though its file is named differently.
from collections.abc import Sequence
from enum import Enum
from typing import Any

class ControlAfterGenerate(str, Enum):
    fixed = "fixed"

class Input:
    id: str
    optional: bool
    def __init__(
        self, id: str, *, optional: bool = False, tooltip: str | None = None, advanced: bool | None = None
    ) -> None: ...

class WidgetInput(Input):
    default: Any

class Output:
    def __init__(
        self, *, display_name: str | None = None, tooltip: str | None = None, is_output_list: bool = False
    ) -> None: ...

_Input = Input
_Output = Output

class ComfyTypeIO:
    class Input(_Input): ...
    class Output(_Output): ...

def Custom(io_type: str) -> type[ComfyTypeIO]: ...

class Clip(ComfyTypeIO): ...
class ClipVision(ComfyTypeIO): ...
class Conditioning(ComfyTypeIO): ...
class Guider(ComfyTypeIO): ...
class Image(ComfyTypeIO): ...
class Latent(ComfyTypeIO): ...
class LoraModel(ComfyTypeIO): ...
class LossMap(ComfyTypeIO): ...
class Model(ComfyTypeIO): ...
class Sampler(ComfyTypeIO): ...
class Vae(ComfyTypeIO): ...

class Boolean:
    class Output(_Output): ...

    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            advanced: bool | None = None,
            default: bool | None = None,
        ) -> None: ...

class Int:
    class Output(_Output): ...

    class Input(WidgetInput):
        min: int | None
        max: int | None
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            advanced: bool | None = None,
            default: int | None = None,
            min: int | None = None,
            max: int | None = None,
            control_after_generate: bool | ControlAfterGenerate | None = None,
        ) -> None: ...

class Float:
    class Output(_Output): ...

    class Input(WidgetInput):
        min: float | None
        max: float | None
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            advanced: bool | None = None,
            default: float | None = None,
            min: float | None = None,
            max: float | None = None,
            step: float | None = None,
            round: float | None = None,
        ) -> None: ...

class String:
    class Output(_Output): ...

    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            advanced: bool | None = None,
            default: str | None = None,
            multiline: bool = False,
        ) -> None: ...

class Combo:
    class Output(_Output): ...

    class Input(WidgetInput):
        options: Sequence[str]
        def __init__(
            self,
            id: str,
            *,
            optional: bool = False,
            tooltip: str | None = None,
            advanced: bool | None = None,
            options: Sequence[str],
            default: str | None = None,
        ) -> None: ...

class Schema:
    node_id: str
    inputs: list[Input]
    def __init__(
        self,
        *,
        node_id: str,
        display_name: str,
        category: str,
        inputs: list[Input],
        outputs: list[Output],
        description: str = "",
        search_aliases: list[str] = ...,
        is_output_node: bool = False,
        hidden: list[Any] = ...,
    ) -> None: ...

class Hidden:
    unique_id: Any

class ComfyNode:
    hidden: Any
    @classmethod
    def define_schema(cls) -> Schema: ...

class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None: ...
