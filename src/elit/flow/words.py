"""Names that a user gives; without torch."""

SAMPLERS = ("euler", "heun", "euler-maruyama", "unipc", "dpm-solver")
GUIDANCES = ("none", "cfg", "ag", "ccfg")
DEFAULT_STEPS, DEFAULT_SCALE = 40, 2.0  # of a sampler, of guidance
