"""How an examination is shown."""
