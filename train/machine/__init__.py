"""What the steps run on: the device, the compiler, the ranks, signals."""
