from typing import Any

import torch

def get_additional_models(conds: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], float]: ...
