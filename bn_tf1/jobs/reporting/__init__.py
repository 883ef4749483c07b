"""A run as a page: its curves from event files, its layers, the doctor's verdict."""
