"""The commands, one verb a file.

Names nothing itself: import the module that is meant.
"""
