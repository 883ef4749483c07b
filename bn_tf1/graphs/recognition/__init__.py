"""The places of a graph where something is normalised per channel over the batch."""
