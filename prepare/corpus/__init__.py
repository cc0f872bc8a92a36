"""From a name to files of text that are there, hashed and pinned."""
