"""One run: settings in, a record out."""
