"""One file a command: its arguments, and what is printed. The work is done elsewhere."""
