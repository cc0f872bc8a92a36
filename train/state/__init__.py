"""What a run saves, and what it goes back to."""
