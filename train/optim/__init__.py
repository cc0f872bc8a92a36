"""Which optimizer updates which weights."""
