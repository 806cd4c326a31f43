from typing import Any

from torch import Tensor

def attention_pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor: ...
