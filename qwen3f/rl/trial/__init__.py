"""Whether reinforcement teaches a tiny model anything that its controls do not learn in the same time."""
