"""Plugins: the hooks, the built-ins and the installed plugins."""
