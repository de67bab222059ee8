"""4. Messages become tokens, and which of them are learnt."""
