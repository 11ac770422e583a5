"""Predicts what a mesh would do, by arithmetic alone: placements, memory, collectives, pipeline and time of a step.

`make.make` is a pure function from Case to MeshPlan, without devices or tensors. text.py and picture.py render a
MeshPlan.
"""
