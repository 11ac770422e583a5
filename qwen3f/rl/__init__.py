"""Reinforcement learning with verifiable rewards: the parts of the stages that train on what the model writes."""
