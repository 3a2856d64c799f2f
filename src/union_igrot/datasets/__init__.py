"""Annotation files, folders and the generated world, read into benchmarks and triplets.

Names nothing itself: import the module that is meant.
"""
