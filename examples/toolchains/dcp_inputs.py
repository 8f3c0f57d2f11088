"""Extrapolate checkpoints of FSDP (torch DCP): python dcp_inputs.py BASE_DCP ALIGNED_DCP OUT [PREFIX]"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from lox_stream import extrapolate, extrapolate_tensor
from lox_stream.for_dcp import DcpTensors, as_safetensors

base, aligned, out = sys.argv[1:4]
prefix = sys.argv[4] if len(sys.argv) > 4 else ""

# either tensor by tensor, with nothing written but the result
before, after = DcpTensors(base, prefix=prefix), DcpTensors(aligned, prefix=prefix)
Path(out).mkdir()
tensors = {name: extrapolate_tensor(name, after[name], before[name]) for name in after}
save_file(tensors, f"{out}/in-memory.safetensors")

# or as folders that everything here reads: resumed, verified, of any size
sides = [as_safetensors(side, f"{out}/{Path(side).name}", prefix=prefix) for side in (base, aligned)]
print(extrapolate(*sides, f"{out}/lox").totals.extrapolated, "matrices")
