"""The web demo: search a gallery on a page, step by step."""
