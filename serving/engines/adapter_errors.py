"""Errors about the names of adapters. Free of torch."""


class UnknownAdapter(ValueError):
    """No adapter of this name is loaded."""


class AdapterExists(ValueError):
    """An adapter of this name is loaded already."""
