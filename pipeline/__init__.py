"""Stages, runs and the command line of millpond."""

__version__ = "0.1.0"
