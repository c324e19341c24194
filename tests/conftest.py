import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run without a GPU; Triton reads it when they are defined


@pytest.fixture
def kernels():
    """kernels.py, where there is Triton, with an interpreter that can loop: 3.6's cannot with NumPy 2.4 and newer."""
    pytest.importorskip("triton")
    import kernels
    device = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"
    parts, log_sums, out = (torch.zeros(shape, device=device) for shape in ((1, 1, 16), (1, 1), (1, 16)))
    try:
        kernels.combine_kernel[(1,)](parts, log_sums, out, 1, D=16, BLOCK=16)
    except Exception as error:
        if "only 0-dimensional arrays can be converted" in str(error):
            pytest.skip(f"Triton's interpreter does not run with this NumPy: {error}")
        raise
    return kernels
