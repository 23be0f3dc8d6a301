"""Time of the optimizer's step: see ``__main__.py``."""
