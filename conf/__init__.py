"""Hydra configuration: run.yaml and the groups that are the axes of a study."""
