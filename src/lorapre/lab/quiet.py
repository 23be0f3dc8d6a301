"""Import this first: it keeps installed packages from printing, on import, what no user of a recipe can act on."""

import logging

# transformers imports torchao where it is installed, which on a CPU reports every GPU extension that it cannot load,
# and registers types in a way that newer versions of torch advise against.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
