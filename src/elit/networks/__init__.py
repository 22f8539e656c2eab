"""Networks by whose features images are compared, and where their weights come from."""
