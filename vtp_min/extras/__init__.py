"""What makes vtp_min fast, large, robust or complete. Each file serves one need; the core never
imports one at module level."""
