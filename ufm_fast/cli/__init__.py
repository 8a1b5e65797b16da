"""The command line ``ufm-fast``. Importing it imports no torch, so that --help is quick."""

from ufm_fast.cli.app import app, main

__all__ = ["app", "main"]
