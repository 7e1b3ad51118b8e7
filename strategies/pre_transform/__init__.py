"""Rewritings of a layer's weight and input that keep their product, one a file."""
