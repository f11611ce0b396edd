"""A trained run as files: a PEFT adapter, whole weights, an upload with its model card."""
