"""``lorapre evaluate``: answers of a language model to mathematical questions, item by item."""
