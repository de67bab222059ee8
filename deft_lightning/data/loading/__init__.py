"""6. Batches in the order of (seed, epoch)."""
