"""A gallery of one's own: images added, removed and searched with a model.

Names nothing itself: import the module that is meant.
"""
