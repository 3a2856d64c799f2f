"""Retrieval metrics of ranks and hit masks, their registry, and statistics over queries."""
