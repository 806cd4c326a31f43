from torch import Tensor
from typing_extensions import Self

class CONDRegular:
    cond: Tensor
    def _copy_with(self, cond: Tensor) -> Self: ...

class CONDCrossAttn(CONDRegular): ...
