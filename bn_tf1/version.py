"""The version of the library, for those of its rooms that tell or compare it."""

VERSION = "0.1.0"
