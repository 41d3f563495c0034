"""What teacher and student share as models: loading, running without gradients, heads, devices."""
