"""Everything worth knowing of one card, in one command: `python -m benchmarks.gpu`."""
