"""Puts this folder on the path: the tests of all rooms share `instruction_rows`."""
