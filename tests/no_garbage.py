"""Imported first where much is imported that stays: the collector would look through it all."""

import gc

gc.disable()
