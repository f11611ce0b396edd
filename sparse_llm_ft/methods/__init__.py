"""The methods. Each is a rule from plan and scores to the next plan, in one file with its settings.

A new method is one such file and one line in `sparse_llm_ft.config.registry.METHODS`, or another package's entry point
in the group ``sparse_llm_ft.methods``. A method's file imports torch only inside functions: its settings are checked
before torch is imported.
"""
