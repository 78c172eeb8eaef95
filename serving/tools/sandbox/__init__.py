"""The process in which the code interpreter runs what a model writes, and what locks it in.

Runs apart from the server, under `python -I`, and imports the standard library alone.
"""
