from types import ModuleType

ck: ModuleType
