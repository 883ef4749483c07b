"""Tests of several workers, on the loopback address."""
