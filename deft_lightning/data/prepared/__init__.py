"""5. Prepared once, kept on disk."""
