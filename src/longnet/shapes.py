"""The legend: one letter per dimension, used in every signature and docstring of the package.

B batch, N tokens, H query heads, K key heads (H % K == 0), D head width. Layout is (B, N, H, D); statistics are (B, H, N).
"""

from jaxtyping import Float, Int
from torch import Tensor

Queries = Float[Tensor, "B Nq H D"]
Keys = Float[Tensor, "B N K D"]
LogSumExp = Float[Tensor, "B H Nq"]
Lengths = Int[Tensor, "B"]
