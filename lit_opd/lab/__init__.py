"""The experiments a user runs around training."""
