"""What networks cost on this machine, timed: `python cli.py benchmark`."""
