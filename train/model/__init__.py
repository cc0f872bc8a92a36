"""The transformer, its attention and its loss. Knows no data."""
