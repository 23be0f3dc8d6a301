"""The arena: many optimizers on the same data, from the same weights, at their best learning rates."""
