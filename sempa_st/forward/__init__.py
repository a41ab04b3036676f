"""Fast forward passes: varlen attention, packing, prefix sharing."""
