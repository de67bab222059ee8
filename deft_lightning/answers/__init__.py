"""Where a text says its answer, and what number it is: one reading for label noise and for graders."""
