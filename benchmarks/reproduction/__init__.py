"""The papers' claims at small scale: `python -m benchmarks.reproduction --help`."""
