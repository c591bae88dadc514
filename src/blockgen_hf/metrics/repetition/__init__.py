"""Share of repeated n-grams in generated texts."""
