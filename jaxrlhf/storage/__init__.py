"""What is on disk, or at a URL: stages, the store of them, run folders, checkpoints."""
