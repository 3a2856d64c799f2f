"""Features of frozen backbones, stored on disk so that each image and text is encoded once.

Import the modules themselves. Below the cache folder lie

    features/<fingerprint>/manifest.json         format and dtype of the folder
    features/<fingerprint>/<shard>.safetensors   one addition: key digests, pooled, optionally tokens, mask, pooled_at
    features/<fingerprint>.lock                  locked by every process that has the folder open
"""
