"""Pictures over HTTP on LitServe; a latency is held by lowering budgets."""
