"""The optimizers: one file each; what they share is in ``base``."""
