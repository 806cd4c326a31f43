from enum import Enum
from typing import Any

class EnumHookType(Enum):
    Weight = ...

class HookGroup:
    def get_type(self, hook_type: EnumHookType) -> list[Any]: ...
