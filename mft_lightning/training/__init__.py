"""What happens around the steps: evaluation, checkpoints, logs."""
