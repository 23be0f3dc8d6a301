"""LoRA-Pre: optimizers whose momenta are kept as two thin factors (arXiv 2602.24283)."""

from lorapre.memory import MemoryEstimate, estimate_memory
from lorapre.optim.adamw import LoRAPreAdamW
from lorapre.optim.gradients import NonFiniteGradientError
from lorapre.optim.lion import LoRAPreLion
from lorapre.optim.muon import LoRAPreMuon
from lorapre.optim.param_groups import param_groups
from lorapre.optim.sgd import LoRAPreSGD

__all__ = [
    "LoRAPreAdamW",
    "LoRAPreLion",
    "LoRAPreMuon",
    "LoRAPreSGD",
    "MemoryEstimate",
    "NonFiniteGradientError",
    "__version__",
    "estimate_memory",
    "param_groups",
]
__version__ = "0.1.0"
