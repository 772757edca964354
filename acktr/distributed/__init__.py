"""Natural gradients of a batch that several processes share (distributed K-FAC, on torch.distributed).

Example:
    torch.distributed.init_process_group("gloo")  # under torchrun, one process per socket; "nccl" with one per GPU
    optimizer = NaturalGradient(network, Categorical(), Distributed(EKFAC(), MemOpt()))

Everything else stays as it is with one process: each rank passes its own examples through the network, and all take the
step that one process with all of the examples would have taken. Where there is no process group, or one process,
`Distributed(choice)` is the choice itself.
"""

from acktr.distributed.assignment import assign
from acktr.distributed.choice import Distributed
from acktr.distributed.placement import CommOpt, Grid, HybridOpt, MemOpt, Placement
from acktr.distributed.ranks import ProcessRanks
from acktr.distributed.refresh import Background, Refresh, Synchronous

__all__ = [
    "Background",
    "CommOpt",
    "Distributed",
    "Grid",
    "HybridOpt",
    "MemOpt",
    "Placement",
    "ProcessRanks",
    "Refresh",
    "Synchronous",
    "assign",
]
