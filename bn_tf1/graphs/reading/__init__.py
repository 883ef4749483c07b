"""Graph files, read without importing or running what is in them."""
