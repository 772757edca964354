"""Every test starts from the same seeds, on one thread."""

import random
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    torch.manual_seed(0)
    if find_spec("numpy"):  # the engine's tests also run where torch is alone
        import numpy as np

        np.random.seed(0)
