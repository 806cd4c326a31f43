from types import ModuleType

eager: ModuleType
