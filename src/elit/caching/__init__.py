"""Step caches: at some steps of a run most of the transformer is left out.

From one step to the next the blocks change the tokens in nearly the same way. A cache keeps what
they added at the last computed step, from where the tokens enter the blocks to where they leave
them, and adds it again where little has changed since. What it keeps lies on spatial tokens, so
it is right at any budget, and where the budget changes between steps.

`configs.py` says what a cache is, `step_cache.py` the same in plain values, `hooks.py` when it
skips and how, `ports.py` finds the tokens in a block, `calibration.py` fits a cache to a model,
`mixin.py` gives models their methods.
"""
