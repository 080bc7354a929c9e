"""Files and folders that are complete or absent: atomic writes, digests, locks, records."""
