"""One thread for all tests and the commands they start: their tensors are tiny, and threads that
wait for each other on a shared machine make them several times slower.
"""
import os

import torch

if "OMP_NUM_THREADS" not in os.environ:  # give it for the slow tests at full width
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
