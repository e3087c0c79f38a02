"""What the library costs, beside the least that could be written: ``python -m benchmarks``."""
