"""Recipes around the optimizers: data, models, training, reports (install with ``pip install 'lorapre[lab]'``)."""
