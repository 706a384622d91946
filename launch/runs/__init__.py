"""What a study runs: its sizes and values, which runs share a process, what they cost, and whether they fit."""
