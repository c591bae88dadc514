"""MAUVE of generated texts and references."""
