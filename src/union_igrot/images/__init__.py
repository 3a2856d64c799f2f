"""Decoding of images, their identity, and conversion to model inputs."""
