"""The update itself, on lists of tensors; the optimizer classes gather those lists and hold the state."""
