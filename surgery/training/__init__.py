"""What a training loop needs beyond rules: a search for sizes (NOAH), sensitivities (SPT)."""
