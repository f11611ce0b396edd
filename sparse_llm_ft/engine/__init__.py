"""DeepSpeed around a model with adapters, and the memory that a plan needs. The only package that imports deepspeed."""
