"""Rectified flow: objective, guidance, and the schedulers that diffusers lacks.

Sigma 1 is noise, 0 is data; velocity = noise - data. (The paper's time runs the other way.)
Nothing here knows a model: it sees a callable.
"""
