"""Parallelism: named meshes and where parameters live on them."""
