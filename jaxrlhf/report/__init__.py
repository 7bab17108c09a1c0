"""The page: report.html of run folders. It reads folders and nothing else."""
