"""Tools that a model may call: a registry, samples, and a code interpreter in a sandbox."""
