"""Fit each layer's surviving weights to what the layer gives in the dense network."""
