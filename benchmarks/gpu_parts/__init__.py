"""The parts of benchmarks/gpu.py: what each measures is said at its top."""
