"""Command line: one table of verbs, one parser for each, errors of one line."""
