"""One run: its stages in order, into a run folder."""
