"""The trained parts - query fusion, target and vision projector.

Names nothing itself: import the module that is meant.
"""
