"""These tests run in Triton's interpreter, in a process of their own: tests/test_interpreted.py
starts it, or by hand

TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m pytest tests/interpreted
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
