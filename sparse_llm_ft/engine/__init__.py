"""DeepSpeed around a model with adapters, and the memory that a plan needs. The only room that imports deepspeed."""
