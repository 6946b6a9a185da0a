"""What plugins supply, as interfaces, and the built-in methods of each kind."""
