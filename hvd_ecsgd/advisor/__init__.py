"""Which method, on this network, for this model; and "do not compress" where that is the truth."""

from .command import add_arguments, advise, connect
from .network import Network, measure
from .predict import CANDIDATES, Candidate, Cost, cost_of, recommended, step_seconds

__all__ = ["CANDIDATES", "Candidate", "Cost", "Network", "add_arguments", "advise", "connect", "cost_of", "measure", "recommended", "step_seconds"]
