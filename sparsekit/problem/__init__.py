"""What is pruned: weights in their flat order, the loss as a likelihood, and the data."""
