"""Attacks: an observation in, a reconstruction out. Nothing here may see the truth."""
