"""Watching a run: numbers that are not finite, signals, what ranks must agree on."""
