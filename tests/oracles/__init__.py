"""Slow, plainly right versions of the algorithms."""
