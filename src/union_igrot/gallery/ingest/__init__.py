"""Ingestion: list images, compare them with an index, decode and embed what is new, and write rows."""
