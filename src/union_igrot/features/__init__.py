"""What frozen backbones said of images and texts, kept on disk so that each is encoded once.

Names nothing itself: import the module that is meant. Under one root lie

    features/<fingerprint>/manifest.json         format and dtype of the folder
    features/<fingerprint>/<shard>.safetensors   one `add`: key digests, pooled, and tokens, mask, pooled_at where kept
    features/<fingerprint>.lock                  locked by every process that has the folder open
"""
