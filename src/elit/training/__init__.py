"""Training: the only place that knows of processes and devices."""
