"""Results for people and programs: tables, files, pictures.

Names nothing itself: import the module that is meant.
"""
