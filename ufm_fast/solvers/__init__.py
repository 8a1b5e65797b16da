"""Solvers: one loop, one Solution."""
