"""Share of distinct n-grams in generated texts."""
