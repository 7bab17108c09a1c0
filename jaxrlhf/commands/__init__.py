"""The commands, a file each: their arguments and what they print. Other folders do the work."""
