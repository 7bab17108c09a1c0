"""Read and write what a run keeps on disk or at a URL: stages, their store, run folders, checkpoints."""
