"""Work on what is on disk: checkpoints, graphs, train directories."""
