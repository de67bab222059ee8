"""2. Any row becomes messages, text or tokens."""
