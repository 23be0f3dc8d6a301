"""Fine-tuning methods on two tasks; see ``__main__.py``."""
