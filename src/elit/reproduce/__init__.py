"""The paper's claims: what each needs trained and measured, and how its verdict comes out."""
