"""Conversations in a terminal: python -m serving.chat MODEL|URL."""
