"""Retrieval metrics, from ranks and hit masks.

Names nothing itself: import the module that is meant.
"""
