"""Fits each layer's kept weights to the layer's outputs in the dense network."""
