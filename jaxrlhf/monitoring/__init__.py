"""Log metrics and progress of a run, and notice what compiles in the middle of a loop."""
