"""Indexing: images into the rows of an index, each content embedded once; `ingest_images` in `indexing.run`.

What `images=` names is found by `data.sources`; a row's columns are named in `data.entries`.
"""
