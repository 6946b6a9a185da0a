"""The interfaces that plugins implement, and the built-in methods of each kind."""
