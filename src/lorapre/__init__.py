"""LoRA-Pre: optimizers whose momenta are kept as two thin factors (arXiv 2602.24283)."""

from lorapre.memory import MemoryEstimate, estimate_memory
from lorapre.optim.adamw import LoRAPreAdamW
from lorapre.optim.base import NonFiniteGradientError
from lorapre.optim.param_groups import param_groups

__all__ = ["LoRAPreAdamW", "MemoryEstimate", "NonFiniteGradientError", "__version__", "estimate_memory", "param_groups"]
__version__ = "0.1.0"
