"""Results for people and programs: tables, files, images.

Names nothing itself: import the module that is meant.
"""
