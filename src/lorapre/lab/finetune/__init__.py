"""Fine-tuning: data, templates, methods, training and saving; ``command.py`` is its entry."""
