"""Stages one after the other, each a process of its own, with a record of what ran from what."""
