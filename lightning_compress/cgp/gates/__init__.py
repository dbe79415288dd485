"""Circuits: what a gate can do (`functions`), gates on a grid (`circuit`), and both as source code (`export`)."""
