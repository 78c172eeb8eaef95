"""The page that a server shows in a browser: its files, its settings, its live view."""
