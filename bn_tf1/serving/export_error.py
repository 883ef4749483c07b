"""The error of a graph of which no model is made."""


class ExportError(ValueError):
    """A graph from which no model can be made that is surely right."""
