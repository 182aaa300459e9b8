"""Half an hour of training in which workers are killed, memory is watched, and the disk is full."""
