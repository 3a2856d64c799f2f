"""Frozen vision-language models behind one contract.

Names nothing itself: import the module that is meant.
"""
