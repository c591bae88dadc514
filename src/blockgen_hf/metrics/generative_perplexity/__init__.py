"""Perplexity of generated texts under a judge (BlockGen, Eq. 10)."""
