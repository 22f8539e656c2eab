"""Parameters and FLOPs by formulas, memory of training, and what devices can do.

`formulas.py` needs neither torch nor diffusers; `flops.py` asks it for a model.
"""
