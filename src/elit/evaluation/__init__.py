"""What a model costs and how good its samples are."""
