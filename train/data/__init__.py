"""Windows of tokens, in the order of the recipe, on their way to the device. Knows no model."""
