"""Plugins: the hooks, the built-ins and what is installed."""
