"""Benchmarks: `video-mae bench`, `bench step` and `bench data`.

kernels.py (with kernel_operations.py, kernel_measurement.py), step.py (with step_models.py) and
data.py (with pipelines.py) each have their keys, `start(config)`, `measure(config)`, which gives
parts of `Results`, and `tables(results)`. What they share: clock.py, record.py, and report.py (with
plots.py), whose `publish` does the rest.
"""
