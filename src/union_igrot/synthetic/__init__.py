"""The generated world: scenes, images, benchmarks, and the pretraining of the bundled tiny backbone."""
