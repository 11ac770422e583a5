"""What a mesh would do, by arithmetic alone: placements, memory, collectives, pipeline and time of a step.

`make` is pure: a Case in, a MeshPlan out; no device, no tensor. Text and pictures are made of the MeshPlan elsewhere.
"""
