"""Direct Preference Optimization in plain PyTorch. Start reading at loop.py, or at losses.py for the mathematics."""

import os

# Before torch is imported: threads that wait for each other shall not spin for long. GNU's OpenMP spins 300,000 times,
# which on cores shared with other work makes a step of a small model many times slower. On idle ones it gains little.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
