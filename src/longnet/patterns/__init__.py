"""Who sees whom, in integers. No torch here: a pattern can be built, checked and costed without a tensor."""

from longnet.patterns.dilated import DilatedPattern, HeadOffsets
from longnet.patterns.hierarchical import Cover, HierarchicalPattern

__all__ = ["Cover", "DilatedPattern", "HeadOffsets", "HierarchicalPattern"]
