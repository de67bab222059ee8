"""One optimizer step, from a batch to changed weights, and the trainer that repeats it."""
