"""Runs stages one after the other, each in its own process, and records what ran from which checkpoint."""
