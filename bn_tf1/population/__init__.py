"""Statistics over data, as against the moving ones: which of them are off, and how far."""
