"""The methods, each a rule plan × measurements -> plan, in a file with its settings.

A new method is one such file and one line in `sparse_llm_ft.config.registry.METHODS`, or an entry point of the group
``sparse_llm_ft.methods`` in another package. A method's file imports torch only inside of functions: its settings are
checked before torch is imported.
"""
