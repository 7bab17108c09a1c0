"""What a run says while it runs: metrics, progress, and what compiles in the middle of a loop."""
