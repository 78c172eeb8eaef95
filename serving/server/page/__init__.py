"""The page that a server shows in a browser: its files, what they ask for, its live view."""
