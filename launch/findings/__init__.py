"""What follows from results: pure functions of them, with no files."""
