"""Entropy of the tokens of generated texts (BlockGen, Eq. 11)."""
