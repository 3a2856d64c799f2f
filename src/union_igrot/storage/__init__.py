"""Atomic writes, file locks, the cache folder, sizes and paths."""
