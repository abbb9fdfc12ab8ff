"""Benchmarks: `video-mae bench`, `bench step` and `bench data`, one module each: kernels.py,
step.py, data.py.

Each has a schema of its keys (with `output` and `baseline`), `tables(run) -> list[Table]`, and a
`start(config)` that measures and hands its run to `report.publish`. What they share is in
records.py.
"""
