"""The tests. They are many small computations: threads that wait for one another would cost more than they bring."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
