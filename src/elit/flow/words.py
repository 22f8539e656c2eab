"""Names that a user gives; without torch."""

SAMPLERS = ("euler", "heun", "euler-maruyama", "unipc", "dpm-solver")
GUIDANCES = ("none", "cfg", "ag", "ccfg")
