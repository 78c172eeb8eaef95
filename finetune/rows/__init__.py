"""Anybody's files to token ids: formats, sources, encoding, streaming."""
