from typing import Any

from torch import Tensor, nn

def escape_important(text: str) -> str: ...
def unescape_important(text: str) -> str: ...
def token_weights(string: str, current_weight: float) -> list[tuple[str, float]]: ...

class SDTokenizer:
    def __init__(
        self,
        tokenizer_path: str,
        max_length: int = 77,
        *,
        embedding_directory: Any = None,
        embedding_size: int = 768,
        tokenizer_data: dict[str, Any] = ...,
    ) -> None: ...

class SD1Tokenizer:
    def __init__(
        self, embedding_directory: Any, tokenizer_data: dict[str, Any], *, tokenizer: type[SDTokenizer]
    ) -> None: ...

class SDClipModel(nn.Module):
    operations: Any
    transformer: Any
    layer: str
    layer_idx: int | None
    return_projected_pooled: bool
    options_default: tuple[Any, ...]
    def __init__(
        self,
        *,
        device: Any,
        max_length: int,
        textmodel_json_config: dict[str, Any],
        dtype: Any,
        special_tokens: dict[str, int],
        layer_norm_hidden_state: bool,
        model_options: dict[str, Any],
    ) -> None: ...

class SD1ClipModel(nn.Module):
    def __init__(self, device: Any, dtype: Any, model_options: dict[str, Any], *, clip_model: Any) -> None: ...
    def encode_token_weights(self, token_weight_pairs: Any) -> tuple[Tensor, ...]: ...
