"""GPUs and the memory that they have. Free of torch."""

GIB, MIB = 2**30, 2**20

# The whole memory that nvidia-smi reports, MiB.
CARDS = {
    "T4": 15360,
    "V100-16G": 16160,
    "A10": 23028,
    "RTX3090": 24576,
    "RTX4090": 24564,
    "V100-32G": 32510,
    "A100-40G": 40960,
    "A40": 46068,
    "L40S": 46068,
    "A100-80G": 81920,
    "H100": 81559,
    "H200": 143771,
}
