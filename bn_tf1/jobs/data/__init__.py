"""Image data sets: files checked to the last byte, and pipelines that resume at any step."""
