"""The command line: options are read, one function is called, and what it gives is printed."""
