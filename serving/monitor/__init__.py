"""Load and memory of GPUs or CPU cores over time, as UELLM's pref.py records them."""
