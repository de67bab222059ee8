"""Graders: whether a completion is right."""
