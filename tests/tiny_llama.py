"""See worlds.py."""

from worlds import save_tiny_llama, tiny_llama  # noqa: F401
