"""Galleries behind one small interface.

Names nothing itself: import the module that is meant.
"""
