"""The demo: a web page on which a gallery is searched, turn after turn.

Knows galleries, models and the web. Does not know configurations or the command line.
"""
