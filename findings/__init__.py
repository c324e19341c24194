"""What ablations.py needs beside its table: stages that run once, comparisons, curves."""
