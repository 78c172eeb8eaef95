"""The page that a server serves: its routes, and what they read and write."""
