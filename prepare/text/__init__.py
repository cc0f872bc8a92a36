"""From files to documents: formats, columns, filters."""
