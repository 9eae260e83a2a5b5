"""Flower's programs with our parts in them; how each part is put in is in seams.py."""
