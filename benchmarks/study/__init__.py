"""The study behind the defaults: see ``__main__.py``."""
