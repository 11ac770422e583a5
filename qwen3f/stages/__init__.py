"""Training stages: each a pure step over (state, batch)."""
