"""The latent interface: all that ELIT adds to a diffusion transformer.

tokens -> head -> Read -> core, on a budget of latents -> Write -> tail -> tokens

`grid.py` cuts the tokens into groups, `read.py` and `write.py` are the two grouped
cross-attentions, `budget.py` says how many latents are kept.
"""

from elit.interface.budget import TailDropping, resolve_budget
from elit.interface.grid import TokenGrid
from elit.interface.read import Read
from elit.interface.write import Write

__all__ = ["Read", "TailDropping", "TokenGrid", "Write", "resolve_budget"]
